"""Output to a terminal or pipe of any encoding."""

import io
import sys


def replace_unencodable_output() -> None:
    """Print `?` for characters that the encoding of stdout or stderr lacks (GBK, ASCII, …), instead of raising UnicodeEncodeError.

    Each command calls it once, at its start."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
