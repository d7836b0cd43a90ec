"""Documents out of jsonl, json, csv, parquet and txt files, plain, .gz or .zst, or out of a Hugging Face data set: as a stream, in a
fixed order, and every error with its file and line.

Files are never held whole in memory. A csv or json may be of any size; a single document has at most MAX_DOCUMENT bytes.
"""

import codecs
import csv
import gzip
import io
import json
import re
import string
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ...common.errors import UserError

MAX_DOCUMENT = 10_000_000  # bytes; a longer one is a file that was not cut into documents
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSED = (".gz", ".zst")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
LONGEST_LINE = 4 * MAX_DOCUMENT  # JSON may write a character in up to six times the bytes
CHUNK = 1 << 20
EXTRA = "pip install 'tritale[data]'"
PIP = {"zstandard": EXTRA, "pyarrow": EXTRA, "datasets": "pip install datasets"}


class Document(NamedTuple):
    text: str
    group: str | None  # the value under the group key
    line: int  # where it begins: line of the file, or row of a parquet file or data set, from 1


class BadInput(UserError):
    """One document, or all the rest of a file, that cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Fields:
    """Which fields of a record make the document."""

    text_key: str | None = "text"
    template: str | None = None  # such as "{genre}：{story}"; in place of text_key
    group_key: str | None = None
    txt_documents: str = "blank-line"  # or "file": what a document of a txt file is

    def __post_init__(self):
        if self.template is not None:
            try:
                parts = list(string.Formatter().parse(self.template))
            except ValueError as error:
                raise UserError(f"--template {self.template!r} cannot be read ({error}); write {{{{ for a brace") from None
            if any(name is not None and (not name or spec or conversion) for _, name, spec, conversion in parts):
                raise UserError(f"--template {self.template!r}: only names of fields may stand in braces, as in '{{genre}}：{{story}}'")
            if not any(name for _, name, _, _ in parts):
                raise UserError(f"--template {self.template!r} names no field; write one in braces, as in '{{genre}}：{{story}}'")

    @property
    def keys(self) -> list[str]:
        """The fields that a record must have."""
        keys = [self.text_key]
        if self.template is not None:
            keys = [name for _, name, _, _ in string.Formatter().parse(self.template) if name]
        return list(dict.fromkeys(keys + [self.group_key] * (self.group_key is not None)))

    def document(self, record: dict, where: str, line: int) -> Document:
        """Raises BadInput for a field that is missing or is not text."""
        if not isinstance(record, dict):
            raise BadInput(f"{where} is {_kind(record)}, not an object with fields; for lists or plain strings use txt, or objects")
        for key in self.keys:
            if record.get(key) is None:
                problem = "null under" if key in record else "no key"
                raise BadInput(f"{where} has {problem} {key!r}; keys there: {', '.join(map(str, record)) or 'none'}")
            is_text_key = self.template is None and key == self.text_key
            if type(record[key]) not in ((str,) if is_text_key else (str, int, float)):
                raise BadInput(f"{where} has {_kind(record[key])} under {key!r}, not text{'' if is_text_key else ' or a number'}")
        group = None if self.group_key is None else str(record[self.group_key])
        if self.template is None:
            return Document(record[self.text_key], group, line)
        parts = string.Formatter().parse(self.template)
        text = "".join(literal + ("" if name is None else str(record[name])) for literal, name, _, _ in parts)
        return Document(text, group, line)

    def check(self, files: list[str]) -> None:
        """Raises ValueError for an option about fields where a file is txt, which has none."""
        txt = next((file for file in files if _format(Path(file)) == ".txt"), None)
        text_key = None if self.text_key == "text" else self.text_key
        for option, value in (("--text-key", text_key), ("--template", self.template), ("--group-key", self.group_key)):
            if txt and value is not None:
                raise UserError(f"{option} {value!r} names a field, but {txt} is plain text; leave out the option or the txt files")


def find_files(inputs: list[str]) -> list[str]:
    """The files that files, globs and folders name, sorted within each, none twice; names of data sets stay as they are.

    A folder gives all files with a known suffix in it and below. Raises FileNotFoundError for an input that names nothing, ValueError
    for a file whose format is not known or whose name is not UTF-8."""
    found: dict[Path, str] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            paths = sorted(str(p) for p in path.rglob("*") if p.is_file() and _format(p) and not p.name.startswith("."))
        elif path.is_file():
            paths = [name]
        elif has_magic(name):
            paths = sorted(p for p in glob(name, recursive=True) if Path(p).is_file())
        elif HUB_NAME.fullmatch(name) and not _format(path):
            paths = [name]
        else:
            raise FileNotFoundError(f"{name} does not exist; --input takes files, folders, globs ('raw/*.jsonl') and names of data sets")
        if not paths:
            known = ", ".join(SUFFIXES)
            raise FileNotFoundError(f"{name} holds no file to read; known are {known}, all but parquet also {' and '.join(COMPRESSED)}")
        for p in paths:
            if Path(p).is_file() and not _format(Path(p)):
                raise UserError(f"{p} is of no known kind; known endings are {', '.join(SUFFIXES)}, then {', '.join(COMPRESSED)}")
            if any("\ud800" <= character <= "\udfff" for character in p):  # so Python writes bytes that are not UTF-8
                raise UserError(f"the name of the file {p!r} is not UTF-8; rename it")
            found.setdefault(Path(p).resolve(), p)
    return list(found.values())


@dataclass
class Reader:
    """Reads documents of `files` in order. With `skip_errors` what cannot be used is counted in `errors` and left out; where that is all
    the rest of a file, the kind of error says from where."""

    files: list[str]
    fields: Fields
    skip_errors: bool = False
    errors: Counter = field(default_factory=Counter)  # kind of error -> how often
    first_errors: list[str] = field(default_factory=list)  # with their places
    bytes_done: int = 0  # of the files before the present one
    _raw: BinaryIO | None = None

    @property
    def bytes_read(self) -> int:
        """How far it is, in bytes of the files as they lie on the disk."""
        return self.bytes_done + (self._raw.tell() if self._raw and not self._raw.closed else 0)

    def read(self, first_file: int = 0, skip: int = 0) -> Iterator[tuple[int, Document]]:
        """(number of the file, document) from `files[first_file]` on, without its first `skip` documents."""
        for number, file in enumerate(self.files):
            size = Path(file).stat().st_size if Path(file).is_file() else 0
            if number >= first_file:
                for document in islice(self._of_file(file, silent=skip), skip, None):
                    yield number, document
                skip = 0
            self._raw = None
            self.bytes_done += size

    def _of_file(self, file: str, silent: int) -> Iterator[Document]:
        # `silent`: what is wrong before this document was counted earlier.
        n_documents, n_records = 0, 0
        try:
            for record, line in self._records(file):
                n_records += 1
                try:
                    if isinstance(record, BadInput):
                        raise record
                    document = record if isinstance(record, Document) else self.fields.document(record, f"{file}:{line}", line)
                    _check_text(document.text, file, line)
                    _check_text(document.group or "", file, line)
                except BadInput as error:
                    self._bad(error, file, counted=n_documents < silent)
                else:
                    yield document
                    n_documents += 1
        except BadInput as error:
            self._bad(error, file, counted=n_documents < silent, is_rest=True)
        else:
            if not n_records:
                self._bad(BadInput(f"{file}:1: the file is empty; leave it out"), file, counted=n_documents < silent)

    def _bad(self, error: BadInput, file: str, counted: bool, is_rest: bool = False) -> None:
        if not self.skip_errors:
            raise error
        if not counted:
            message = str(error).removeprefix(f"{file}:").encode("utf-8", "backslashreplace").decode()  # halves of surrogate pairs
            line, kind = re.fullmatch(r"(\d+):? (.*?)(?:; keys there.*| \(.*)?", message, re.DOTALL).groups()
            self.errors[f"{kind}: the rest of the file from {file}:{line} on" if is_rest else kind] += 1
            if len(self.first_errors) < 10:
                self.first_errors.append(f"{file}:{message}")

    def _records(self, file: str) -> Iterator[tuple[dict | Document | BadInput, int]]:
        # (record, line); raises BadInput where the rest of the file is lost.
        path = Path(file)
        if not path.is_file():
            yield from _hub_rows(file)
            return
        kind = _format(path)
        if kind == ".parquet":
            yield from _parquet_rows(file, self.fields.keys)
            return
        with open(path, "rb") as self._raw:
            stream, line = _decompressed(self._raw, path), 1
            try:
                if kind in (".jsonl", ".ndjson"):
                    records = _json_lines(stream, file)
                elif kind == ".json":
                    records = _json_values(stream, file)
                elif kind in (".csv", ".tsv"):
                    records = _csv_rows(stream, file, "\t" if kind == ".tsv" else ",")
                else:
                    records = _txt_documents(stream, file, self.fields.txt_documents)
                for record, line in records:
                    yield record, line
            except (EOFError, gzip.BadGzipFile, zlib.error, _zstd_error()) as error:
                raise BadInput(f"{file}:{line}: the compressed file is damaged after this line ({error}); fetch it again") from None


def _json_lines(stream: BinaryIO, file: str):
    loads = _json_loads()
    for number, line in enumerate(_lines(stream), 1):
        if not line.strip():
            continue
        if len(line) > LONGEST_LINE:
            yield BadInput(_too_long(file, number)), number
            continue
        try:
            yield loads(line), number
        except (ValueError, RecursionError) as error:
            yield (_not_utf8(line, file, number) or BadInput(f"{file}:{number}: broken JSON ({error}): {_excerpt(line)}")), number


def _json_values(stream: BinaryIO, file: str):
    # The elements of arrays, or values one after another (JSON lines under another name), decoded as they come. After a broken one of
    # the latter, from the next line that begins with "{"; after a broken element the rest is lost, as no place in it is sure to be outside.
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    utf8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")  # bytes that are not UTF-8: as in _csv_rows
    text, position, line, at_end = "", 0, 1, False
    after, lost = "nothing", None  # after: nothing, a value, or of an array its "[", ",", an "element", its "]"; lost: the broken value

    while True:
        if lost:
            end = text.find("\n{", position) + 1
            is_found, end = end > 0, end or max(position, len(text) - 1)
        else:
            end = _JSON_SPACE.match(text, position).end()
        line += text.count("\n", position, end)
        position = end
        if lost and is_found:
            yield lost, line
            lost = None
        if position < len(text) and not lost:
            mark = text[position]
            if (after, mark) in _JSON_MARKS:
                after, position = mark, position + 1
                continue
            if after in ("]", "element"):
                problem = "no comma before this element" if after == "element" else "only another array may follow an array"
                raise BadInput(f"{file}:{line}: broken JSON ({problem}): {text[position : position + 60]!r}")
            in_array = after in ("[", ",")
            try:
                value, end = decoder.raw_decode(text, position)
                problem, is_cut = None, end == len(text)
            except json.JSONDecodeError as error:
                problem, end = error.msg, error.pos
                is_cut = end > len(text) - 16 or problem.startswith("Unterminated string")  # 16: more than any word or escape
            except (ValueError, RecursionError) as error:
                problem, end, is_cut = str(error), position, False
            is_long = problem is not None and is_cut and len(text) - position > LONGEST_LINE
            if at_end or is_long or not is_cut:
                source = text[position : end + (problem is not None)]
                bad = None if source.isascii() else _not_utf8(source.encode("utf-8", "surrogateescape"), file, line)
                if problem is None:
                    yield bad or value, line
                    after = "element" if in_array else "value"
                    line += text.count("\n", position, end)
                    position = end
                    continue
                at = line + text.count("\n", position, end)
                lost = bad or BadInput(
                    _too_long(file, line) if is_long else f"{file}:{at}: broken JSON ({problem}): {text[position : position + 60]!r}"
                )
                if in_array:
                    raise lost
                after = "value"
                continue
        if at_end:
            if lost:
                raise lost
            if after in ("[", ",", "element"):
                raise BadInput(f"{file}:{line}: the JSON array has no end; the file was cut off")
            return
        # At least doubled, so that a long value is not decoded anew for each chunk.
        chunk = stream.read(max(CHUNK, 2 * (len(text) - position)))
        at_end = not chunk
        text, position = text[position:] + utf8.decode(chunk, at_end), 0


_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_JSON_MARKS = {("nothing", "["), ("]", "["), ("[", "]"), ("element", "]"), ("element", ",")}


def _csv_rows(stream: BinaryIO, file: str, delimiter: str):
    csv.field_size_limit(2**31 - 1)
    # Bytes that are not UTF-8 become surrogates, which _check_text finds: so the place is known and the next row is read.
    line, length = 1, 0  # of the present row: its first line, its bytes so far

    def lines():
        nonlocal length
        for raw in _lines(stream):
            if length > LONGEST_LINE:
                raise BadInput(f"{file}:{line}: a row longer than {LONGEST_LINE // 10**6} MB; a quote may be missing there")
            length += len(raw)
            yield raw.decode("utf-8", "surrogateescape")

    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        _check_text("".join(header), file, 1)
        line, length = rows.line_num + 1, 0
        for row in rows:
            if len(row) == len(header):
                yield dict(zip(header, row, strict=True)), line
            elif row:
                yield BadInput(f"{file}:{line}: {len(row)} fields where the header has {len(header)} ({', '.join(header)})"), line
            line, length = rows.line_num + 1, 0
    except csv.Error as error:
        raise BadInput(f"{file}:{line}: broken csv ({error}); a quote may be missing there") from None


def _txt_documents(stream: BinaryIO, file: str, documents: str):
    lines, first, length = [], 1, 0
    for number, raw in enumerate(_lines(stream), 1):
        line = raw.decode("utf-8", "surrogateescape")
        if line.strip() or documents == "file":
            if not lines:
                first = number
            lines.append(line)
            length += len(line)
            if length > LONGEST_LINE:
                raise BadInput(_too_long(file, first))
        elif lines:
            yield Document("".join(lines).rstrip("\r\n"), None, first), first
            lines, length = [], 0
    if lines:
        yield Document("".join(lines).rstrip("\r\n"), None, first), first


def _parquet_rows(file: str, keys: list[str]):
    parquet = _import("pyarrow.parquet", file)
    import pyarrow

    number = 0
    try:
        with parquet.ParquetFile(file, memory_map=False, pre_buffer=False) as table:
            present = table.schema_arrow.names
            missing = [key for key in keys if key not in present]
            if missing:
                raise BadInput(f"{file}:1 has no key {missing[0]!r}; keys there: {', '.join(present)}")
            for batch in table.iter_batches(batch_size=1024, columns=keys, use_threads=False):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError:
                    rows = (_parquet_row(batch.slice(i, 1), file, number + 1) for i in range(len(batch)))
                for row in rows:
                    number += 1
                    yield row, number
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise BadInput(f"{file}:{number + 1}: not a whole parquet file ({error})") from None


def _parquet_row(batch, file: str, row: int) -> dict | BadInput:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadInput(f"{file}:{row}: not UTF-8 (byte 0x{error.object[error.start]:02X}); write the column anew, as UTF-8")


def _hub_rows(name: str):
    datasets = _import("datasets", name)
    for number, row in enumerate(datasets.load_dataset(name, split="train", streaming=True), 1):
        yield row, number


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    # Lines with their ends, without a byte order mark; of one that is longer than any document can be, its first LONGEST_LINE + 1 bytes.
    line = stream.readline(LONGEST_LINE + 1).removeprefix(codecs.BOM_UTF8)
    while line:
        yield line
        while line and not line.endswith(b"\n"):
            line = stream.readline(LONGEST_LINE + 1)
        line = stream.readline(LONGEST_LINE + 1)


def _check_text(text: str, file: str, line: int) -> None:
    try:
        too_long = len(text) > MAX_DOCUMENT // 4 and len(text.encode("utf-8")) > MAX_DOCUMENT
        if not too_long and not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "surrogatepass")
        try:
            raw = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise BadInput(f"{file}:{line}: half of a surrogate pair, which UTF-8 cannot hold ({_excerpt(raw)})") from None
        raise _not_utf8(raw, file, line) from None
    if too_long:
        raise BadInput(_too_long(file, line))


def _too_long(file: str, line: int) -> str:
    return f"{file}:{line}: a document longer than {MAX_DOCUMENT // 10**6} MB; cut it into documents"


def _not_utf8(raw: bytes, file: str, line: int) -> BadInput | None:
    try:
        raw.decode("utf-8")
        return None
    except UnicodeDecodeError as error:
        place = error.start
    with open(file, "rb") as f:  # more of the file tells more
        try:
            sample = _decompressed(f, Path(file)).read(1 << 16)
        except Exception:
            sample = raw
    encoding = next(filter(None, (_guess(data) for data in (sample, raw) if _is_not_utf8(data))), None)
    if encoding:  # iconv spells utf_16_le of Python as utf-16le
        encoding = re.sub(r"_(?=[bl]e$)", "", encoding).replace("_", "-")
    guess = f"it may be {encoding}: iconv -f {encoding} -t utf-8" if encoding else "its encoding could not be guessed"
    return BadInput(f"{file}:{line}: not UTF-8 (byte 0x{raw[place]:02X}); {guess}")


def _guess(data: bytes) -> str | None:
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return next((e for e in ("gb18030", "big5", "utf-16") if _decodes(data, e)), None)
    best = from_bytes(data).best()
    return best.encoding if best else None


def _is_not_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.end < len(raw)  # more than a last character cut in two
    return False


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw[: len(raw) // 4 * 4].decode(encoding)
        return True
    except UnicodeDecodeError as error:
        return error.end >= len(raw) - 4


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(raw)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw, _import("zstandard", str(path))), CHUNK)
    return raw


class _ZstdStream(io.RawIOBase):
    # The library's own stream takes a file that was cut off for one that ends there.
    def __init__(self, raw: BinaryIO, zstandard):
        self._raw, self._new = raw, zstandard.ZstdDecompressor().decompressobj
        self._frame, self._data, self._compressed = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._data:
            self._compressed = self._compressed or self._raw.read(1 << 16)
            if not self._compressed:
                if self._frame:
                    raise EOFError("it ends inside a frame")
                return 0
            self._frame = self._frame or self._new()
            self._data = self._frame.decompress(self._compressed)
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._data))
        buffer[:n], self._data = self._data[:n], self._data[n:]
        return n


def _zstd_error() -> type[Exception]:
    try:
        from zstandard import ZstdError
    except ImportError:
        return EOFError
    return ZstdError


def _format(path: Path) -> str | None:
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix
    suffix = suffix.lower()
    return suffix if suffix in SUFFIXES and not (suffix == ".parquet" and path.suffix.lower() in COMPRESSED) else None


def _json_loads():
    try:
        import orjson

        return orjson.loads
    except ImportError:
        return lambda line: json.loads(line.decode("utf-8"), parse_constant=_no_constant)


def _no_constant(name: str):
    raise UserError(f"{name} is no JSON")


def _import(module: str, what: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UserError(f"{what} needs the package {package}, which is not installed: {PIP[package]}") from None


def _kind(value) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number", bytes: "bytes"}
    return "null" if value is None else kinds.get(type(value)) or f"a {type(value).__name__}"


def _excerpt(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", "replace").strip())
