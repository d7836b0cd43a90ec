"""Documents: records of the input files reduced to their text and group, one after another and in batches."""

import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...common.errors import UserError
from .checks import BadInput, check_text, no_key
from .inputs import file_format
from .readers import Records, hub_rows, parquet_rows, records

BATCH_DOCUMENTS, BATCH_CHARACTERS = 2048, 1 << 20  # that a worker gets at once
MAX_FIRST_ERRORS = 10


class Document(NamedTuple):
    text: str
    group: str | None  # the value under the group key
    line: int  # where it begins: line of the file, or row of a parquet file or data set, from 1


@dataclass(frozen=True)
class Fields:
    """Which fields of a record make the document."""

    text_key: str | None = "text"
    template: str | None = None  # such as "{genre}：{story}"; in place of text_key
    group_key: str | None = None
    txt_documents: str | None = None  # line, blank-line, file or endoftext; None: according to the file

    def __post_init__(self):
        if self.template is None:
            return
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise UserError(f"--template {self.template!r} cannot be read ({error}); write {{{{ for a brace") from None
        if any(name is not None and (not name or spec or conversion) for _, name, spec, conversion in parts):
            raise UserError(f"--template {self.template!r}: braces may contain only names of fields, as in '{{genre}}：{{story}}'")
        if not any(name for _, name, _, _ in parts):
            raise UserError(f"--template {self.template!r} names no field; write one in braces, as in '{{genre}}：{{story}}'")

    @cached_property
    def _parts(self) -> list[tuple[str, str | None]]:
        # (literal text, the field after it) of the template
        return [(literal, name) for literal, name, _, _ in string.Formatter().parse(self.template or "")]

    @cached_property
    def keys(self) -> list[str]:
        """The fields that a record must have."""
        keys = [self.text_key] if self.template is None else [name for _, name in self._parts]
        return [key for key in dict.fromkeys([*keys, self.group_key]) if key is not None]

    def document(self, record: Any, file: str, line: int) -> Document:
        """Build the document of a record. Raises BadInput if a field is missing or is not text."""
        if not isinstance(record, dict):
            raise BadInput(file, line, f"{_kind(record)}, not an object with fields; for lists or plain strings use txt, or objects")
        for key in self.keys:
            if key not in record:
                raise no_key(file, line, key, [str(k) for k in record])
            types, expected = (str, int, float), "not a string or a number"
            if self.template is None and key == self.text_key:
                types, expected = (str,), "not a string"
            if type(record[key]) not in types:
                raise BadInput(file, line, f"{_kind(record[key])} under {key!r}, {expected}")
        filled = (literal + ("" if name is None else str(record[name])) for literal, name in self._parts)
        text = record[self.text_key] if self.template is None else "".join(filled)
        return Document(text, None if self.group_key is None else str(record[self.group_key]), line)

    def check(self, files: list[str]) -> None:
        """Raises UserError for an option about fields if one of the files is txt, which has none."""
        txt = next((file for file in files if file_format(Path(file)) == ".txt"), None)
        text_key = None if self.text_key == "text" else self.text_key
        for option, value in (("--text-key", text_key), ("--template", self.template), ("--group-key", self.group_key)):
            if txt and value is not None:
                raise UserError(f"{option} {value!r} names a field, but {txt} is plain text; leave out the option or the txt files")


def _kind(value) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", bytes: "bytes"}
    return "null" if value is None else kinds.get(type(value)) or f"a {type(value).__name__}"


@dataclass
class Reader:
    """Reads the documents of `files` in order. With `skip_errors`, unusable documents are counted in `errors` and left out."""

    files: list[str]
    fields: Fields
    skip_errors: bool = False
    errors: Counter = field(default_factory=Counter)  # kind of error -> how often; it names the place if the rest of a file is lost
    first_errors: list[str] = field(default_factory=list)  # messages
    _bytes_before: int = 0  # of the files before the current one
    _raw: FileIO | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, of compressed files as they are on the disk."""
        return self._bytes_before + (self._raw.tell() if self._raw and not self._raw.closed else 0)

    def read(self, first_file: int = 0, skip: int = 0) -> Iterator[tuple[int, Document]]:
        """Yield (index of the file, document), from `files[first_file]` on and without its first `skip` documents."""
        for i, file in enumerate(self.files):
            size = Path(file).stat().st_size if Path(file).is_file() else 0
            if i >= first_file:
                for document in islice(self._documents(file, skip), skip, None):
                    yield i, document
                skip = 0
            self._raw = None
            self._bytes_before += size

    def batches(self, first: int, place: list[int]) -> Iterator["Batch"]:
        """Yield the documents from number `first` on, which comes after `place`: the `place` of an earlier batch, or [0, 0]."""
        batch, n_characters = Batch(first, place), 0
        for file, document in self.read(*place):
            before, n = batch.place
            batch.place = [file, n + 1 if file == before else 1]
            batch.texts.append(document.text)
            batch.groups.append(document.group)
            batch.places.append(f"{self.files[file]}:{document.line}")
            n_characters += len(document.text)
            if len(batch.texts) == BATCH_DOCUMENTS or n_characters > BATCH_CHARACTERS:
                yield self._finish(batch)
                batch, n_characters = Batch(batch.first + len(batch.texts), batch.place), 0
        if batch.texts:
            yield self._finish(batch)

    def _finish(self, batch: "Batch") -> "Batch":
        batch.errors, batch.first_errors, batch.bytes_read = dict(self.errors), list(self.first_errors), self.bytes_read
        return batch

    def _documents(self, file: str, n_counted: int) -> Iterator[Document]:
        # Errors before document `n_counted` were counted earlier.
        n_documents, is_empty = 0, True

        def handle(error: BadInput, kind: str) -> None:
            if not self.skip_errors:
                raise error
            if n_documents >= n_counted:
                self.errors[_printable(kind)] += 1
                self.first_errors += [_printable(str(error))] if len(self.first_errors) < MAX_FIRST_ERRORS else []

        try:
            for record, line in self._records(file):
                is_empty = False
                try:
                    if isinstance(record, BadInput):
                        raise record
                    document = self.fields.document(record, file, line)
                    check_text(document.text, file, line)
                    check_text(document.group or "", file, line)
                except BadInput as error:
                    handle(error, error.kind)
                else:
                    yield document
                    n_documents += 1
            if is_empty:
                handle(BadInput(file, 1, "the file is empty", "; leave it out"), "the file is empty")
        except BadInput as error:
            handle(error, f"{error.kind}: the rest of the file from {file}:{error.line} on")

    def _records(self, file: str) -> Records:
        if not Path(file).is_file():
            yield from hub_rows(file)
        elif file_format(Path(file)) == ".parquet":
            yield from parquet_rows(file, self.fields.keys)
        else:
            with open(file, "rb", buffering=0) as self._raw:
                yield from records(file, self._raw, self.fields.txt_documents)


def _printable(text: str) -> str:
    # Keys may contain halves of surrogate pairs.
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass
class Batch:
    """Documents that a worker gets at once."""

    first: int  # the number of its first document, from 0 over all files
    place: list[int]  # after it: index of the file, documents read of that file
    texts: list[str] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # file:line
    errors: dict[str, int] = field(default_factory=dict)  # so far, as in Reader
    first_errors: list[str] = field(default_factory=list)
    bytes_read: int = 0


def at_place(function: Callable[[list], Any], items: list, places: list[str]) -> Any:
    """`function(items)`, for items of documents. If it fails, the error names the place of the document on which it fails."""
    try:
        return function(items)
    except Exception as error:
        for i in range(len(items) if len(items) > 1 else 0):
            at_place(function, items[i : i + 1], places[i : i + 1])
        place = " to ".join(dict.fromkeys((places[0], places[-1])))
        kind = UserError if isinstance(error, UserError) else RuntimeError
        raise kind(f"{place}: the document cannot be processed ({str(error) or type(error).__name__})") from error
