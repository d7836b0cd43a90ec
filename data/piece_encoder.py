"""Encoding a corpus: the ids of `Tokenizer.encode_batch`, several times faster than the library makes them.

The library spends most of its time cutting text into pieces (`tokenizer.PIECES`) with a regular expression. Here the cuts of a whole
batch come from a few array operations over its characters, and each distinct piece is encoded once and then looked up. That gives the
same ids: no merge crosses a piece, so the ids of a text are those of its pieces one after another.
"""

import json
import struct
from itertools import chain, pairwise

import numpy as np
import tokenizers
from tokenizers import Regex, pre_tokenizers

from .shards import DTYPES, dtype_name
from .tokenizer import PIECES, Tokenizer

LETTER, DIGIT, LINE_END, SPACE, MARK, UNKNOWN = range(6)  # the classes of characters that PIECES tells apart
CODE_POINTS = 0x110000
MAX_CACHED = 1 << 17  # pieces; some 20 MB


class PieceEncoder:
    """Encodes batches of documents for one tokenizer; keeps the pieces it has seen."""

    def __init__(self, tokenizer: Tokenizer):
        self.dtype = DTYPES[dtype_name(tokenizer.vocab_size)]
        self._tokenizer = tokenizer
        self._splitter = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
        backend = json.loads(tokenizer.to_json())
        self._is_by_pieces = backend["pre_tokenizer"] == _as_json(self._splitter) and backend["normalizer"] is None
        self._begin = np.array(tokenizer.eot_id, self.dtype).tobytes()
        self._ids = _IdsOfPieces(tokenizer, "H" if self.dtype.itemsize == 2 else "I")
        self._classes = np.full(CODE_POINTS, UNKNOWN, np.uint8)  # filled as characters are met

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all documents one after another, each with `<|endoftext|>` in front, (tokens,) in the dtype of the shards, and how
        many each document has, (documents,) int64."""
        if not self._is_by_pieces:  # a tokenizer of another make
            ids = self._tokenizer.encode_batch(texts, bos=True)
            return np.fromiter(chain.from_iterable(ids), self.dtype), np.array([len(i) for i in ids], np.int64)
        if len(self._ids) > MAX_CACHED:
            self._ids.clear()
        whole = "".join(texts)
        document_ends = np.cumsum([len(text) for text in texts])
        cuts = self._cuts(whole, document_ends)
        ids_of = self._ids
        ids = [ids_of[whole[i:j]] for i, j in pairwise(cuts.tolist())]
        borders = np.searchsorted(cuts, [0, *document_ends]).tolist()
        documents = [self._begin + b"".join(ids[i:j]) for i, j in pairwise(borders)]
        lengths = np.array([len(document) for document in documents]) // self.dtype.itemsize
        return np.frombuffer(b"".join(documents), self.dtype), lengths

    def _cuts(self, text: str, document_ends: np.ndarray) -> np.ndarray:
        # Where PIECES cuts `text`: (pieces + 1,), from 0 to len(text). No piece reaches over the end of a document.
        if not text:
            return np.zeros(1, np.int64)
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        classes = self._classes[codes]
        if (classes == UNKNOWN).any():
            for code in np.unique(codes[classes == UNKNOWN]):
                self._classes[code] = self._class_of(chr(code))
            classes = self._classes[codes]
        is_cut = np.ones(len(codes) + 1, bool)
        before, after = classes[:-1], classes[1:]
        is_cut[1:-1] = (before != after) | (after == DIGIT) | ((after == MARK) & (codes[:-1] != codes[1:]))
        is_cut[document_ends] = True
        # A single space belongs to the letters behind it; of several, none does.
        alone = np.flatnonzero((codes == 0x20) & is_cut[:-1] & is_cut[1:])
        alone = alone[alone + 1 < len(codes)]
        alone = alone[(classes[alone + 1] == LETTER) & ~np.isin(alone + 1, document_ends)]
        is_cut[alone + 1] = False
        return np.flatnonzero(is_cut)

    def _class_of(self, character: str) -> int:
        # Asked of the library, so that both hold the same version of Unicode.
        def n_pieces(text):
            return len(self._splitter.pre_tokenize_str(text))

        if character in "\r\n":
            return LINE_END
        if n_pieces("a" + character) == 1:
            return LETTER
        if n_pieces(character * 2) == 2:
            return DIGIT
        return SPACE if n_pieces("\t" + character) == 1 else MARK


class _IdsOfPieces(dict[str, bytes]):
    # The ids of a piece as they lie in a shard; encoded when first asked for.
    def __init__(self, tokenizer: Tokenizer, code: str):
        self._encode, self._code = tokenizer.encode_piece, code

    def __missing__(self, piece: str) -> bytes:
        ids = self._encode(piece)
        self[piece] = packed = struct.pack(f"<{len(ids)}{self._code}", *ids)
        return packed


def _as_json(pre_tokenizer) -> dict:
    blank = tokenizers.Tokenizer(tokenizers.models.BPE())
    blank.pre_tokenizer = pre_tokenizer
    return json.loads(blank.to_str())["pre_tokenizer"]
