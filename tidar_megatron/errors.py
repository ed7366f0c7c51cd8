"""The errors that a user can cause and correct, and the reasons for which a training run ends early."""


class UserError(ValueError):
    """An error in the user's input. The message is one line that names what is wrong and says how to fix it."""


class LocalError(UserError):
    """A :class:`UserError` that only some ranks raise; the message names the rank."""


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """A request to stop: the run ends early, after it has saved and printed why."""


class Diverged(Exception):  # noqa: N818 - describes a run
    """A run that makes no progress, with too many skipped steps in a row. The message is one line."""


class Stalled(Exception):  # noqa: N818 - describes a rank
    """A timeout of a rank that waits for another rank or for data. The message is one line: the rank, the step."""
