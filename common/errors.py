"""The error that a command reports as one line."""


class UserError(ValueError):
    """Something that the user can correct: a bad value, a missing or damaged file.

    Commands print its message as one line and exit with status 1. Any other exception is a bug and keeps its traceback.
    The message names the value, the allowed values and the next step."""
