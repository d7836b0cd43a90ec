"""Writing files and folders that are complete or absent: they are written under a temporary name, synced and renamed."""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError

LOCK = ".lock"
_TEMPORARY_FOLDER = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(?:tmp|old)")


def temporary_of(path: Path) -> Path:
    """The name under which `atomic_file` writes `path`. The next writer overwrites what a killed process left there."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield `temporary_of(path)`; at the end, sync it and rename it to `path`. After an error `path` is as it was before.

    Only one process may write `path` at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        temporary.replace(path)
        sync_entries(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, holder: str) -> Iterator[None]:
    """Hold the lock of `folder`, which is created if needed. The operating system releases it when the process ends, however it ends.

    Raises UserError if another process holds it; `holder` names that process, for example "another training process"."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        with suppress(NotImplementedError):  # the file system has no locks
            lock.acquire(timeout=0.5)  # longer than `is_locked` holds it
    except Timeout:
        raise UserError(f"{folder} is in use by {holder}; wait until it ends or stop it, or choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of `folder`. Writes nothing. False if the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        try:
            with locked(folder, ""):
                return False
        except UserError:
            return True
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; at the end, sync it and rename it to `folder`, in place of an earlier one.

    After an error (a full disk, for example) the temporary folder is removed and `folder` is as it was before."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_folder(folder, "tmp")
    try:
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        if folder.exists():
            old = temporary.with_suffix(".old")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
        sync_entries(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder under a temporary name, so that a killed process leaves no incomplete folder under its own name."""
    old = _temporary_folder(folder, "old")
    folder.rename(old)
    shutil.rmtree(old)


def final_name(path: Path) -> str | None:
    """The name that `path` gets or had if it is a temporary folder of `atomic_folder` or `remove_folder`, else None."""
    match = _TEMPORARY_FOLDER.fullmatch(path.name)
    return match[1] if match else None


def _temporary_folder(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.{suffix}")


def sync_folder(folder: Path) -> None:
    """Write a folder with all its files to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_entries(path)
        else:
            _sync(path, os.O_RDWR)


def sync_entries(folder: Path) -> None:
    """Write the names in a folder to the disk, so that new files and renames are durable. Does nothing on Windows, which cannot do it."""
    if os.name == "posix":
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, which is read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write indented UTF-8 JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json_object(path: Path, *, remedy: str) -> dict:
    """Read a JSON object. Raises UserError, ending in `remedy`, if the file is not JSON or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: nested thousands of levels deep
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object; {remedy}")
    return value
