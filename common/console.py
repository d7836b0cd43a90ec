"""Output to a terminal or pipe of any encoding, and durations as text."""

import io
import os
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class LastingOutput(io.TextIOWrapper):
    """Text output that is dropped if it cannot be written: the reader of a pipe has ended, the disk is full, the terminal is closed."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()

    def close(self) -> None:  # also called when it is collected; the buffer belongs to the stream that it replaces
        self.flush()


def prepare_output(*, is_lasting: bool = False) -> None:
    """Print `?` for characters that the encoding of stdout or stderr lacks (GBK, ASCII, …), instead of raising UnicodeEncodeError, and drop
    the output of a stream that was closed before the start. With `is_lasting` it is also dropped if it cannot be written.

    Each command calls it once, at its start."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
            if is_lasting and not isinstance(stream, LastingOutput):
                form = {"encoding": stream.encoding, "errors": "replace", "line_buffering": stream.line_buffering}
                setattr(sys, name, LastingOutput(stream.buffer, write_through=stream.write_through, **form))


def duration(seconds: float) -> str:
    """A time as "42 s", "12 minutes", "3.1 hours" or "5.2 days"."""
    for unit, n in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * n:
            return f"{seconds / n:,.{int(seconds < 10 * n)}f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def progress_bar(console: "Console") -> "Progress":
    """A bar with the number of items and the time left, which disappears at its end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


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
