"""The error that a command reports as one line, and the sentences for errors of files."""

import errno


class UserError(ValueError):
    """Something that the user can correct: a bad value, a missing or damaged file.

    Commands print its message as one line and exit with status 1. Any other exception is a bug and keeps its traceback.
    The message names the value, the allowed values and the next step."""


def one_line(error: BaseException) -> str:
    """The message of a library's error, which may have several lines, in one."""
    return " ".join(str(error).split())


REASONS = {
    errno.ENOENT: "does not exist; check the path",
    errno.ENOTDIR: "cannot be used: a part of the path is a file, not a folder; choose another path",
    errno.EEXIST: "exists and is not a folder; choose another path",
    errno.EISDIR: "is a folder, not a file; choose another path",
    errno.EACCES: "is not permitted for this user; choose a path of your own, or change its permissions",
    errno.EPERM: "is not permitted for this user; choose a path of your own, or change its permissions",
    errno.EROFS: "is on a read-only disk; choose a path on another",
    errno.ENOSPC: "does not fit: the disk is full; free some space, or choose a path on another disk",
    errno.ENAMETOOLONG: "is too long for a path; choose a shorter one",
}


def sentence(error: BaseException) -> str:
    """The message of an error; for an error of the operating system, the file, what is wrong with it and the next step."""
    if isinstance(error, OSError) and error.errno in REASONS and (error.filename is not None or error.errno == errno.ENOSPC):
        return f"{error.filename or 'what it writes, or prints into a file,'} {REASONS[error.errno]}"
    return str(error)
