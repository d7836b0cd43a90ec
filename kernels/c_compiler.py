"""Compiles a C file for this machine (about a second) and keeps the library in the user's cache."""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path


def _machine() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return platform.platform() + "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _is_private(path: Path, *, is_parent: bool = False) -> bool:
    """Whether only this user can write the file or folder. A parent may also belong to root, or be writable with the sticky bit."""
    if not hasattr(os, "getuid"):  # Windows
        return True
    status = path.lstat()
    is_ours = status.st_uid in ((os.getuid(), 0) if is_parent else (os.getuid(),))
    is_sticky = is_parent and bool(status.st_mode & stat.S_ISVTX)
    return is_ours and not stat.S_ISLNK(status.st_mode) and (is_sticky or not status.st_mode & 0o022)


def _cache_folder() -> Path | None:
    """The folder for the compiled library; None if another user could put a file there."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "")
        base = base if base.is_absolute() else Path.home() / ".cache"
        if not base.is_absolute():
            return None
        folder = base.resolve() / "tritale"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # read-only, for example, or a user without a home
        return None
    is_safe = _is_private(folder) and all(_is_private(parent, is_parent=True) for parent in folder.parents)
    return folder if is_safe else None


def _compile(compiler: str, source: Path, flags: tuple[str, ...], folder: Path) -> Path:
    """Compile the source into `folder`. Raises OSError with the compiler's message."""
    built = folder / f"{source.stem}.so"
    result = subprocess.run(
        [compiler, str(source), "-o", str(built), *flags], capture_output=True, text=True, encoding="utf-8", timeout=120,
        env=os.environ | {"LC_ALL": "C"},
    )  # fmt: skip
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
        raise OSError(next((line for line in lines if "error" in line), lines[0]))
    built.chmod(0o700)  # whatever the umask
    return built


def load(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL | str:
    """The library compiled from `source` by cc, GCC or Clang with `flags`, or a sentence for the user why it is not available."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)
    if compiler is None:
        return "no C compiler (cc, gcc, clang) was found; without one tritale is slower on a CPU (Debian: apt install gcc)"
    key = hashlib.sha256(source.read_bytes() + repr((compiler, flags, _machine())).encode()).hexdigest()[:16]
    try:
        if (folder := _cache_folder()) is None:
            with tempfile.TemporaryDirectory() as private:  # the library stays loaded after its file is removed
                return ctypes.CDLL(str(_compile(compiler, source, flags, Path(private))))
        # The content's hash is in the name: a truncated file, after a crash for example, would end the process.
        kept = folder.glob(f"{source.stem}-{key}-*.so")
        path = next((p for p in kept if _is_private(p) and p.stem == f"{source.stem}-{key}-{_digest(p)}"), None)
        if path is None:
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                built = _compile(compiler, source, flags, Path(temporary))
                path = folder / f"{source.stem}-{key}-{_digest(built)}.so"
                built.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{source.name} could not be compiled or loaded ({error}); the slower PyTorch path runs"
