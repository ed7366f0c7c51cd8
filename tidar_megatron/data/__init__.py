"""From text to the batches that a step consumes. Knows no model and, but for its ``.idx`` files, no Megatron.

A new kind of source is a subclass of ``documents.StoredDocuments``: files, and a function that finds what lies where.
"""
