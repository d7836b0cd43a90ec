"""Output to a terminal or pipe of any encoding."""

import io
import sys


def replace_unencodable_output() -> None:
    """Print `?` for characters that the encoding of stdout or stderr lacks (GBK, ASCII, …), instead of raising UnicodeEncodeError.

    Each command calls it once, at its start."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def wrapped(text: str) -> str:
    """The text as stderr should get it: a terminal gets lines broken at spaces (it breaks inside words itself), a pipe gets one line."""
    if not sys.stderr.isatty():
        return text
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    return "\n".join(line.plain.rstrip() for line in Text(text).wrap(console, console.width))
