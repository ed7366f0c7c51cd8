"""The errors that a user can cause and correct, and the reasons for which a training run ends early."""


class UserError(ValueError):
    """Bad input. The message is one line, names what is wrong, and says how to mend it."""


class LocalError(UserError):
    """Bad input that not every rank met; the message names the rank."""


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to leave before its end, saved, and has said so."""


class Diverged(Exception):  # noqa: N818 - said of a run
    """Training does not get on: step after step had to be skipped. The message is one line."""


class Stalled(Exception):  # noqa: N818 - said of a rank
    """A rank waits in vain, for another or for its data. The message is one line and names the rank and the step."""
