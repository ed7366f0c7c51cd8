"""The programs of the command ``tidar``, one module each; ``main.py`` starts the one that is named.

A module holds ``main()``, which parses ``sys.argv``, imports what is heavy only then, and raises ``UserError``.
"""
