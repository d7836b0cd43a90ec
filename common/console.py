"""Output to a terminal or pipe of any encoding, and durations as text."""

import io
import os
import sys
import time
from typing import NoReturn


def replace_unencodable_output() -> None:
    """Print `?` for characters that the encoding of stdout or stderr lacks (GBK, ASCII, …), instead of raising UnicodeEncodeError.

    Each command calls it once, at its start."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def duration(seconds: float) -> str:
    """A time as "42 s", "12 minutes", "3.1 hours" or "5.2 days"."""
    for unit, n in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * n:
            return f"{seconds / n:,.{int(seconds < 10 * n)}f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def wrapped(text: str) -> str:
    """The text as stderr should get it: a terminal gets lines broken at spaces (it breaks inside words itself), a pipe gets one line."""
    if not sys.stderr.isatty():
        return text
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    return "\n".join(line.plain.rstrip() for line in Text(text).wrap(console, console.width))


def end_with(message: str) -> NoReturn:
    """End this process with status 1 and a message. The other processes of a run wait before it: the launcher ends them in the meantime if
    the main process fails too, and one message is enough."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)
    sys.exit(wrapped(message))
