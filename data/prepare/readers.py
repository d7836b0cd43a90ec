"""One reader for each file format: a stream of (record, line).

A record is a dictionary. A record that cannot be read is a BadInput in its place; an error after which the rest of the file cannot be
read is raised. No file is held in memory completely.
"""

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from json.decoder import JSONDecodeError
from pathlib import Path
from typing import Any, BinaryIO

from ...common.errors import UserError, one_line
from ..tokenizer import END_OF_TEXT
from .checks import MAX_DOCUMENT, BadInput, check_text, excerpt, no_key, not_utf8, other_encoding, too_long, utf16
from .inputs import decompressed, file_format, import_package

LONGEST_LINE = 4 * MAX_DOCUMENT  # JSON may write a character in up to six times the bytes
CHUNK = 1 << 20  # bytes of JSON
SEPARATOR = END_OF_TEXT  # between documents of a txt file
_MARK = re.compile(r"(?:[-=*#_~+—–·•] ?){2,}|</?[^<>]{1,30}>|\[[A-Z]{1,10}\]")  # a line that often separates documents
_BREAKS = {
    "\f": "form feeds",
    "\u2028": "line separators (U+2028)",
    "\u2029": "paragraph separators (U+2029)",
    "\x85": "next lines (U+0085)",
}
FEWEST_MARKS = 5
LINES_PER_BLOCK = 20  # a txt file with more may have a document on each line

Records = Iterator[tuple[Any, int]]


def records(file: str, raw: io.FileIO, txt_documents: str | None) -> Records:
    """Read an open file that is not parquet."""
    suffix, line, damage = file_format(Path(file)), 1, ()
    try:
        stream, damage = decompressed(raw, file)
        start = stream.peek().removeprefix(codecs.BOM_UTF8)
        if encoding := utf16(start[:4096]):
            raise other_encoding(file, 1, start[0], encoding)
        if suffix in (".jsonl", ".ndjson", ".json"):
            found = _json_lines(stream, file) if _is_json_lines(start, suffix) else _json_values(stream, file)
        elif suffix in (".csv", ".tsv"):
            found = _csv_rows(stream, file, "\t" if suffix == ".tsv" else ",")
        else:
            found = _txt_documents(stream, file, txt_documents or _txt_layout(start, file))
        for record, line in found:
            yield record, line
    except damage as error:
        raise BadInput(file, line, "the compressed file is damaged after this line", f" ({one_line(error)}); fetch it again") from None
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, after line {line}", file) from None


# ---- JSON -------------------------------------------------------------------------------------------------------------------------------


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_no_constant)
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


def _is_json_lines(start: bytes, suffix: str) -> bool:
    # Decided by the start of the file, since arrays are also named .jsonl, and lines .json.
    start = start.lstrip()
    is_array = start.startswith(b"[")
    has_objects = any(_is_object(line) for line in re.split(rb"[\r\n]+", start, maxsplit=4)[:4])
    is_spread = re.match(rb"\{\s*[\r\n]", start) or _is_object(start.partition(b"}{")[0] + b"}")  # objects over lines, or several in one
    return has_objects and not is_array if suffix == ".json" else has_objects or not (is_array or is_spread)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(_JSON.decode(line.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(stream: BinaryIO, file: str) -> Records:
    for number, line in enumerate(_lines(stream), 1):
        if not line.strip():
            continue
        if len(line) > LONGEST_LINE:
            yield too_long(file, number), number
            continue
        bad = None if line.isascii() else not_utf8(line.encode("utf-8", "surrogateescape"), file, number)
        try:
            yield bad or _JSON.decode(line), number
        except (ValueError, RecursionError) as error:
            problem = f"{error.msg}, column {error.colno}" if isinstance(error, JSONDecodeError) else str(error)
            yield _broken_json(file, number, problem, line), number


def _json_values(stream: BinaryIO, file: str) -> Records:
    # The elements of one or several arrays, or values one after another.
    text = _JsonText(stream, file)
    is_array = text.peek() == "["
    while text.peek():
        if not is_array:
            yield text.value()
            continue
        if not text.skip("["):
            raise text.broken("only another array may follow an array")
        is_end = text.skip("]")
        while not is_end:
            yield text.value()
            is_end = text.skip("]")
            if not is_end and not text.skip(","):
                raise text.broken("no comma before this element")


class _JsonText:
    """A position in JSON text that is read in chunks. (ijson 3.6 is no substitute: it reads half a surrogate pair as "?", gives up the file
    at an integer above 64 bits or a byte that is not UTF-8, and needs more than 60 GB for 200,000 opening brackets.)"""

    def __init__(self, stream: BinaryIO, file: str):
        self._stream, self._file, self._line = stream, file, 1
        self._text, self._position, self._at_end = "", 0, False
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")  # as in _lines

    def peek(self) -> str:
        """Skip white space and return the next character, or "" at the end."""
        while True:
            match = _JSON_SPACE.match(self._text, self._position)
            assert match
            self._advance(match.end())
            if self._position < len(self._text) or self._at_end:
                return self._text[self._position : self._position + 1]
            self._read()

    def skip(self, mark: str) -> bool:
        """Skip the next character if it is `mark`."""
        is_there = self.peek() == mark
        self._advance(self._position + is_there)
        return is_there

    def value(self) -> tuple[Any, int]:
        """Decode the next value: (value, line), with BadInput for a value that is not UTF-8. Raises BadInput if it is broken."""
        if not self.peek():
            raise self.broken("")
        while True:
            value, problem = None, None
            try:
                value, end = _JSON.raw_decode(self._text, self._position)
                is_cut = end == len(self._text)
            except JSONDecodeError as error:
                problem, end = error.msg, error.pos
                is_cut = end > len(self._text) - 16 or problem.startswith("Unterminated string")  # 16: more than any word or escape
            except (ValueError, RecursionError) as error:
                problem, end, is_cut = str(error), self._position, False
            is_long = problem is not None and is_cut and len(self._text) - self._position > LONGEST_LINE
            if self._at_end or is_long or not is_cut:
                break
            self._read()
        line, source = self._line, self._text[self._position : end + (problem is not None)]
        bad = None if source.isascii() else not_utf8(source.encode("utf-8", "surrogateescape"), self._file, line)
        if problem is not None:
            raise bad or (too_long(self._file, line) if is_long else self.broken(problem, end))
        self._advance(end)
        return bad or value, line

    def broken(self, problem: str, place: int | None = None) -> BadInput:
        """The error about the value at the position, found at `place`."""
        if self._position == len(self._text):
            return BadInput(self._file, self._line, "the JSON array has no end", "; the file was cut off")
        line = self._line + self._text.count("\n", self._position, place or self._position)
        return _broken_json(self._file, line, problem, self._text[self._position : self._position + 60])

    def _advance(self, position: int) -> None:
        self._line += self._text.count("\n", self._position, position)
        self._position = position

    def _read(self) -> None:
        # The amount of unread text at least doubles, so that a long value is not decoded again for each chunk.
        chunk = self._stream.read(max(CHUNK, 2 * (len(self._text) - self._position)))
        self._at_end = not chunk
        self._text, self._position = self._text[self._position :] + self._utf8.decode(chunk, self._at_end), 0


# ---- other formats ----------------------------------------------------------------------------------------------------------------------


def _csv_rows(stream: BinaryIO, file: str, delimiter: str) -> Records:
    csv.field_size_limit(2**31 - 1)
    line, length = 1, 0  # of the current row: its first line, its characters so far

    def lines():
        nonlocal length
        for text in _lines(stream):
            if length > LONGEST_LINE:
                raise BadInput(file, line, f"a row longer than {LONGEST_LINE // 10**6} MB", "; a quote may be missing there")
            length += len(text)
            yield text

    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        check_text("".join(header), file, 1)
        line, length = rows.line_num + 1, 0
        for row in rows:
            if len(row) == len(header):
                yield dict(zip(header, row, strict=True)), line
            elif row:
                yield BadInput(file, line, f"{len(row)} fields, but {len(header)} in the header", f" ({', '.join(header)})"), line
            line, length = rows.line_num + 1, 0
    except csv.Error as error:
        raise BadInput(file, line, "broken csv", f" ({one_line(error)}); a quote may be missing there") from None


def _txt_layout(start: bytes, file: str) -> str:
    # What a document is, from the start of the file. Raises UserError if that is unclear.
    text = start.decode("utf-8", "replace")
    if _is_object(start.lstrip().split(b"\n")[0]) or re.match(r"\s*\[\s*\{\s*\"", text):
        raise UserError(f"{file} contains JSON; rename it to .jsonl or .json, or choose --txt-documents line, blank-line or file")
    lines = [line.strip() for line in re.split(r"\r\n?|\n", text.replace(SEPARATOR, "\n"))]
    n_lines, n_blocks = sum(map(bool, lines)), sum(bool(b) and not a for a, b in pairwise(["", *lines]))
    if n_separators := text.count(SEPARATOR):
        if n_blocks > LINES_PER_BLOCK * (n_separators + 1):
            raise UserError(
                f"{file}: is a document a block or what is between {SEPARATOR} marks? Its start has {n_blocks:,} blocks with blank lines "
                f"between them and {n_separators:,} of the marks; choose --txt-documents endoftext, or remove the marks"
            )
        return "endoftext"
    ((mark, n_marks),) = Counter(filter(_MARK.fullmatch, lines)).most_common(1) or [("", 0)]
    found = f"{n_marks:,} lines of its start are {mark}"
    if n_marks < max(FEWEST_MARKS, n_blocks // 20):
        mark = max(_BREAKS, key=text.count)
        n_marks, found = text.count(mark), f"its start has {text.count(mark):,} {_BREAKS[mark]} and {n_lines:,} lines"
        n_marks = n_marks if n_marks > n_lines else 0
    if n_marks >= max(FEWEST_MARKS, n_blocks // 20):
        raise UserError(
            f"{file}: {found}; if documents are separated there, replace them "
            f"by {SEPARATOR}; else choose --txt-documents line, blank-line or file"
        )
    if n_lines > (LINES_PER_BLOCK * n_blocks if n_blocks > 1 else 1):
        blocks = f"{n_blocks:,} blocks with blank lines between them" if n_blocks > 1 else "no blank line"
        raise UserError(
            f"{file}: is a document a line, a block or the file? Its start has {n_lines:,} lines and {blocks}; "
            "choose --txt-documents line, blank-line or file"
        )
    return "blank-line"


def _txt_documents(stream: BinaryIO, file: str, documents: str) -> Records:
    lines, first, length = [], 1, 0

    def document() -> tuple[dict, int]:
        nonlocal lines, length
        text, lines, length = "".join(lines).rstrip("\r\n"), [], 0
        return {"text": text}, first

    for number, line in enumerate(_lines(stream), 1):
        if SEPARATOR in line and documents != "endoftext":
            raise BadInput(file, number, f"a line with {SEPARATOR}", "; --txt-documents endoftext separates the documents there")
        for i, part in enumerate(line.split(SEPARATOR)):
            if i and lines:
                yield document()
            if part.strip() or documents == "file" or (lines and documents == "endoftext"):
                first = first if lines else number
                lines.append(part)
                length += len(part)
                if length > LONGEST_LINE:
                    raise too_long(file, first)
            elif lines:  # the end of a block
                yield document()
        if documents == "line" and lines:
            yield document()
    if lines:
        yield document()


def parquet_rows(file: str, keys: list[str]) -> Records:
    """Read these columns of a parquet file, all if there are none; the line is the row, from 1."""
    parquet = import_package("pyarrow.parquet", file)
    import pyarrow

    number = 0
    try:
        with parquet.ParquetFile(file, memory_map=False, pre_buffer=False) as table:
            present = table.schema_arrow.names
            if missing := [key for key in keys if key not in present]:
                raise no_key(file, 1, missing[0], present)
            for batch in table.iter_batches(batch_size=1024, columns=keys or None, use_threads=False):
                try:
                    rows = batch.to_pylist()
                except (ValueError, OverflowError):
                    rows = (_parquet_row(batch.slice(i, 1), file, number + 1) for i in range(len(batch)))
                for row in rows:
                    number += 1
                    yield row, number
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise BadInput(file, number + 1, "not a complete parquet file", f" ({one_line(error)})") from None


def _parquet_row(batch, file: str, row: int) -> dict | BadInput:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadInput(file, row, f"not UTF-8 (byte 0x{error.object[error.start]:02X})", "; write the column again as UTF-8")
    except (ValueError, OverflowError) as error:
        return BadInput(file, row, "a value that Python cannot hold", f" ({one_line(error)}); write the column as text")


def hub_rows(name: str) -> Records:
    """Stream the split train of a Hugging Face data set; the line is the row, from 1."""
    datasets, number = import_package("datasets", name), 0
    try:
        for number, row in enumerate(datasets.load_dataset(name, split="train", streaming=True), 1):
            yield row, number
    except Exception as error:  # of the network, the hub, or the files of any format
        raise UserError(f"{name}:{number + 1}: the data set cannot be read ({type(error).__name__}: {error})") from error


def _lines(stream: BinaryIO) -> Iterator[str]:
    # Lines with their ends, without a byte order mark; only the beginning of a line that is longer than any document. Bytes that are not
    # UTF-8 become surrogates, which check_text finds. So their place is known, and the next line can be read.
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    while line := text.readline(LONGEST_LINE + 1):
        yield line
        while len(line) > LONGEST_LINE and not line.endswith(("\n", "\r")):
            line = text.readline(LONGEST_LINE + 1)


def _broken_json(file: str, line: int, problem: str, source: str) -> BadInput:
    return BadInput(file, line, "broken JSON", f" ({problem}): {excerpt(source)}")
