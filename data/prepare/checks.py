"""Errors about input that cannot be used, and checks of its length and encoding."""

import codecs
import re
from contextlib import suppress

from ...common.errors import UserError
from .inputs import decompressed

MAX_DOCUMENT = 10_000_000  # bytes; a longer one is a file that was not cut into documents


class BadInput(UserError):
    """A document, or the rest of a file, that cannot be used. `kind` is the same for all errors that are counted together."""

    def __init__(self, file: str, line: int, kind: str, detail: str = ""):
        super().__init__(f"{file}:{line}: {kind}{detail}")
        self.line, self.kind = line, kind


def check_text(text: str, file: str, line: int) -> None:
    """Raises BadInput for a text that is not UTF-8 or longer than a document may be."""
    try:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError:
        bad = None
        with suppress(UnicodeEncodeError):
            bad = not_utf8(text.encode("utf-8", "surrogateescape"), file, line)
        shown = excerpt(text.encode("utf-8", "replace").decode())
        raise bad or BadInput(file, line, "half of a surrogate pair, which UTF-8 cannot encode", f" ({shown})") from None
    if size > MAX_DOCUMENT:
        raise too_long(file, line)


def too_long(file: str, line: int) -> BadInput:
    return BadInput(file, line, f"a document longer than {MAX_DOCUMENT // 10**6} MB", "; cut it into documents")


def no_key(file: str, line: int, key: str, present: list[str]) -> BadInput:
    separator = next((c for c in ";\t|，" if c in present[0]), None) if len(present) == 1 else None
    hint = "; tabs separate the columns: name the file .tsv" if separator == "\t" else ""
    hint = hint or f"; if {separator} separates the columns, save the file with commas, or with tabs as .tsv" if separator else ""
    return BadInput(file, line, f"no key {key!r}", f"; keys there: {', '.join(present) or 'none'}{hint}")


def not_utf8(raw: bytes, file: str, line: int) -> BadInput | None:
    """The error about bytes that are not UTF-8, with the encoding that they may have; None if they are UTF-8."""
    place = _utf8_error(raw)
    if place is None:
        return None
    sample = b""
    with suppress(Exception), open(file, "rb", buffering=0) as f:  # more of the file gives a better guess
        sample = decompressed(f, file)[0].read(1 << 16)
    return other_encoding(file, line, raw[place], _guess_encoding(sample) or _guess_encoding(raw))


def other_encoding(file: str, line: int, byte: int, encoding: str | None) -> BadInput:
    advice = f"it may be {encoding}: iconv -f {encoding}" if encoding else "convert it, for example from gb18030: iconv -f gb18030"
    return BadInput(file, line, f"not UTF-8 (byte 0x{byte:02X})", f"; {advice} -t utf-8")


def utf16(start: bytes) -> str | None:
    """The kind of UTF-16 or UTF-32 in which a file begins. UTF-16 without a byte order mark is found by the zero bytes of ASCII."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    place, zeros = _utf8_error(start), start.count(0)
    if not zeros or (3 * zeros < len(start) and (place is None or place > len(start) - 4)):
        return None
    score, encoding = max((_readable(start.decode(encoding, "replace")), encoding) for encoding in ("utf-16le", "utf-16be"))
    return encoding if score > 0.9 else None


def _readable(text: str) -> float:
    # The share of Chinese and ASCII characters; the latter count twice, since two bytes of ASCII may also be a Chinese character.
    n_chinese, n_ascii = (len(re.findall(kind, text)) for kind in (r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]", r"[\t-\r -~]"))
    return (n_chinese + 2 * n_ascii) / len(text)


def _utf8_error(raw: bytes) -> int | None:
    # The place of the first error.
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start


def _guess_encoding(data: bytes) -> str | None:
    place = _utf8_error(data)
    if place is None or place > len(data) - 4:  # the last character is cut
        return None
    with suppress(ImportError):
        from charset_normalizer import from_bytes

        best = from_bytes(data).best()
        # iconv spells utf_16_le of Python as utf-16le.
        return re.sub(r"_(?=[bl]e$)", "", best.encoding).replace("_", "-") if best else None


def excerpt(text: str) -> str:
    return repr(text[:60].strip())
