"""Files that are whole or not there: written aside, synced, renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_of(path: Path) -> Path:
    """Where `path` is written before it is whole; what a killed process left there is overwritten by the next."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """`temporary_of(path)`, synced and renamed to `path` at the end: `path` is whole, or as it was before. One writer at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_entries(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_entries(folder: Path) -> None:
    """Make renames and new names inside `folder` durable. Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
