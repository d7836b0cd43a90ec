"""The input files that --input names, opening them, and the optional packages that this needs."""

import codecs
import gzip
import importlib
import io
import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from glob import glob, has_magic
from pathlib import Path
from types import ModuleType
from typing import Any

from ...common.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSED = (".gz", ".zst")
OTHER_COMPRESSIONS = (".gzip", ".zstd", ".bz2", ".xz", ".lzma", ".lz4", ".br", ".zip", ".7z", ".rar")
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": "bz2", b"\xfd7zXZ": "xz", b"PK\3\4": "zip", b"7z\xbc\xaf": "7z"}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
BUFFER = 1 << 20  # bytes; the format of a file is decided by so many


def find_files(inputs: list[str]) -> list[str]:
    """List the files that the paths, globs and folders name: sorted within each, without repetition. Names of data sets stay as they are.

    A folder gives all files below it with a known suffix, without hidden files and folders; links are followed. Raises
    FileNotFoundError for an input that names nothing, and UserError for a file of unknown format or with a name that is not UTF-8."""
    found: dict[Path, str] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            paths = sorted(str(p) for p in _walk(path))
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
    # The files of known format below the folder that are not hidden. A folder is read once, even if links form a loop.
    seen = set()

    def fail(error: OSError) -> None:  # a folder that may not be read
        raise error

    for name, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        if (real := os.path.realpath(name)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for path in (Path(name, file) for file in files if not file.startswith(".")):
            if file_format(path) and not path.exists():
                raise FileNotFoundError(f"{path} is a link to a file that does not exist; correct it, or remove it")
            if path.suffix.lower() in OTHER_COMPRESSIONS and file_format(Path(path.stem)):
                raise UserError(f"{path} is compressed in another way than {' and '.join(COMPRESSED)}; unpack it, or move it elsewhere")
            if file_format(path) and path.is_file():
                yield path


def file_format(path: Path) -> str | None:
    """The suffix, in lower case, that says how to read `path`, without that of a compression; None if it is unknown."""
    is_compressed = path.suffix.lower() in COMPRESSED
    suffix = (Path(path.stem).suffix if is_compressed else path.suffix).lower()
    return suffix if suffix in SUFFIXES and not (suffix == ".parquet" and is_compressed) else None


def import_package(module: str, what: str) -> ModuleType:
    """Import an optional module. Raises UserError with the command that installs it if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.removesuffix(".parquet")
        raise UserError(f"{what} needs the package {package}, which is not installed: pip install {package}") from None


def decompressed(raw: io.FileIO, file: str) -> "tuple[io.BufferedReader[Any], tuple[type[Exception], ...]]":
    """The decompressed stream, and the exceptions that it raises if the file is damaged. How a file that is no text is compressed is read
    from its start, else from its suffix. Raises UserError for a compression that is not known."""
    stream, kind = io.BufferedReader(raw, BUFFER), Path(file).suffix.lower()
    start = stream.peek()[:64]
    if _is_text(start):
        return stream, ()
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), kind)
    if kind in MAGIC.values() and kind not in COMPRESSED:
        raise UserError(f"{file} is a {kind} file under another name; unpack it")
    if kind == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=stream), BUFFER), (EOFError, gzip.BadGzipFile, zlib.error)
    if kind == ".zst":
        zstd = import_package(ZSTD, file)
        window = zstd.DecompressionParameter.window_log_max
        stream = zstd.ZstdFile(stream, options={window: window.bounds()[1]})  # files written with --long=31, too
        return io.BufferedReader(stream, BUFFER), (EOFError, zstd.ZstdError)
    return stream, ()


def _is_text(start: bytes) -> bool:
    # Whether it is UTF-8 without NUL, apart from a character that is cut at the end.
    with suppress(UnicodeDecodeError):
        return start != b"" and "\0" not in codecs.getincrementaldecoder("utf-8")().decode(start)
    return False
