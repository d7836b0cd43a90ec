"""The input files that --input names, opening them, and the optional packages that this needs."""

import gzip
import importlib
import io
import os
import re
import sys
import zlib
from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path
from types import ModuleType

from ...common.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSED = (".gz", ".zst")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
BUFFER = 1 << 20  # bytes; the format of a file is decided by so many
EXTRA = "of the extra tritale[data]"


def find_files(inputs: list[str]) -> list[str]:
    """List the files that the paths, globs and folders name: sorted within each, without repetition. Names of data sets stay as they are.

    A folder gives all files below it with a known suffix, without hidden files and folders; links are followed. Raises
    FileNotFoundError for an input that names nothing, and UserError for a file of unknown format or with a name that is not UTF-8."""
    found: dict[Path, str] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            paths = sorted(str(p) for p in _walk(path) if file_format(p))
        elif path.is_file():
            paths = [name]
        elif has_magic(name):
            paths = sorted(p for p in glob(name, recursive=True) if Path(p).is_file())
        elif HUB_NAME.fullmatch(name) and not file_format(path):
            paths = [name]
        else:
            raise FileNotFoundError(f"{name} does not exist; --input takes files, folders, globs ('raw/*.jsonl') and names of data sets")
        if not paths:
            known = ", ".join(SUFFIXES)
            raise FileNotFoundError(f"{name} holds no input file; known suffixes: {known}, all but parquet also {' and '.join(COMPRESSED)}")
        for p in paths:
            if Path(p).is_file() and not file_format(Path(p)):
                raise UserError(f"{p} has an unknown format; known suffixes: {', '.join(SUFFIXES)}, then {', '.join(COMPRESSED)}")
            if any("\ud800" <= character <= "\udfff" for character in p):  # how Python represents bytes that are not UTF-8
                raise UserError(f"the name of the file {p!r} is not UTF-8; rename it")
            found.setdefault(Path(p).resolve(), p)
    return list(found.values())


def _walk(folder: Path) -> Iterator[Path]:
    # The files below the folder that are not hidden. A folder is read once, even if links form a loop.
    seen = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        if (real := os.path.realpath(name)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(name, file) for file in files if not file.startswith(".") and Path(name, file).is_file())


def file_format(path: Path) -> str | None:
    """The suffix, in lower case, that says how to read `path`, without that of a compression; None if it is unknown."""
    is_compressed = path.suffix.lower() in COMPRESSED
    suffix = (Path(path.stem).suffix if is_compressed else path.suffix).lower()
    return suffix if suffix in SUFFIXES and not (suffix == ".parquet" and is_compressed) else None


def import_package(module: str, what: str, extra: str = f", {EXTRA}") -> ModuleType:
    """Import an optional module. Raises UserError with the command that installs it if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.removesuffix(".parquet")
        raise UserError(f"{what} needs the package {package}{extra}, which is not installed: pip install {package}") from None


def decompressed(raw: io.FileIO, file: str) -> tuple[io.BufferedReader, tuple[type[Exception], ...]]:
    """The decompressed stream, and the exceptions that it raises if the file is damaged."""
    suffix = Path(file).suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BUFFER), (EOFError, gzip.BadGzipFile, zlib.error)
    if suffix == ".zst":
        zstd = import_package(ZSTD, file)
        window = zstd.DecompressionParameter.window_log_max
        stream = zstd.ZstdFile(raw, options={window: window.bounds()[1]})  # files written with --long=31, too
        return io.BufferedReader(stream, BUFFER), (EOFError, zstd.ZstdError)
    return io.BufferedReader(raw, BUFFER), ()
