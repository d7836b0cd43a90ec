"""The tokenizer: trained on a sample of the documents, and encoding all of them with the package fastokens."""

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from ..chat import EMPHASIS, NEXT, encode_chats, parse_chat
from ..shards import DTYPES, dtype_name
from ..tokenizer import FIXED_TOKENS, SPECIAL_TOKENS, Tokenizer
from .deduplicate import RECORD, TRAIN, chunks, normalise
from .documents import Reader, at_place

SAMPLE_CHARACTERS = 6_000_000  # to train the tokenizer; more gains little, and takes 60 bytes of memory for each
PIECE = 1 << 16  # characters; the trainer takes more memory for a longer text


def sample(reader: Reader, status: np.ndarray, path: Path, characters: int) -> list[str]:
    """A sample of about `characters` of the training documents, chosen by their hashes and in the order of the input. Long documents are
    cut into pieces. `path` holds the documents' records."""
    in_training = lambda first, records: status[first : first + len(records)] == TRAIN
    total = sum(int(r["characters"][in_training(first, r)].sum(dtype=np.int64)) for first, r in chunks(path, RECORD))
    limit = min(int(characters / max(total, 1) * 2**64), 2**64 - 1)
    parts = [first + np.flatnonzero(in_training(first, r) & (r["hash"][:, 0] <= np.uint64(limit))) for first, r in chunks(path, RECORD)]
    wanted = iter(np.concatenate(parts).tolist())
    texts, room, number = [], round(1.1 * characters), next(wanted, int(np.argmax(status == TRAIN)))  # all may have high hashes
    for i, (_, document) in enumerate(reader.read()):
        if i == number:
            text = normalise(document.text)[:room]
            texts += (text[start : start + PIECE] for start in range(0, len(text), PIECE))
            room -= len(text)
            number = next(wanted, None)
            if number is None or not room:
                break
    return texts


class BulkEncoder:
    """Encodes batches of documents with fastokens: the ids of `Tokenizer.encode_batch`, several times faster. If fastokens is not
    installed (`is_fallback`), or fails on a batch, `tokenizers` encodes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._dtype = tokenizer, DTYPES[dtype_name(tokenizer.vocab_size)]
        try:
            import fastokens
        except ImportError:
            self._fast = None
        else:
            self._fast = fastokens.Tokenizer.from_json_str(tokenizer.to_json())

    @property
    def is_fallback(self) -> bool:
        return self._fast is None

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all documents one after another, each with `<|endoftext|>` in front: (tokens,) in the dtype of the shards; and the
        number of tokens of each document: (documents,) int64."""
        if self._fast is not None:
            with suppress(ValueError):  # its regular expressions have a limited stack: thousands of equal marks are too much for them
                ids, borders = self._fast.encode_batch_flat(texts, split_special_tokens=True)
                borders = np.frombuffer(borders, "<u8").astype(np.int64)  # (documents + 1,)
                ids = np.insert(np.frombuffer(ids, "<u4").astype(self._dtype), borders[:-1], self._tokenizer.eot_id)
                return ids, np.diff(borders) + 1
        ids = self._tokenizer.encode_batch(texts, bos=True)
        return np.fromiter(chain.from_iterable(ids), self._dtype), np.array([len(i) for i in ids], np.int64)

    def encode_chats(self, chats: list[list[dict[str, str]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of all conversations one after another and the number of tokens of each, as `encode`; and which are learnt: (tokens,)
        uint8."""
        encoded = encode_chats(self._tokenizer, chats)
        ids = np.fromiter(chain.from_iterable(ids for ids, _ in encoded), self._dtype)
        learnt = np.fromiter(chain.from_iterable(flags for _, flags in encoded), np.uint8)
        return ids, np.array([len(i) for i, _ in encoded], np.int64), learnt


@lru_cache(maxsize=1)
def _encoder(folder: str, tokenizer_hash: str) -> BulkEncoder:
    return BulkEncoder(Tokenizer.load(folder))


def encode(folder: str, tokenizer_hash: str, splits: Sequence[tuple[list[str], list[str]]], is_chat: bool) -> list[tuple[np.ndarray, ...]]:
    """Encode the (texts, places) of each split with the tokenizer in `folder`: (ids, tokens, characters, byte tokens, learnt), three of
    them for each document. Of conversations only the (chosen) answers' characters count; otherwise `learnt` is empty."""
    results, encoder = [], _encoder(folder, tokenizer_hash)
    for texts, places in splits:
        texts = [normalise(text) for text in texts]
        ids, lengths, learnt = np.empty(0, np.uint16), np.empty(0, np.int64), np.empty(0, np.uint8)
        if is_chat and texts:
            parts = [text.split(NEXT) for text in texts]  # two of a pair
            ids, lengths, learnt = encoder.encode_chats([parse_chat(part) for part in chain.from_iterable(parts)])
            lengths = lengths.reshape(len(texts), -1).sum(1)
            texts = ["".join(m["content"].replace(EMPHASIS, "") for m in parse_chat(part[0]) if m["role"] == "assistant") for part in parts]
        elif texts:
            ids, lengths = at_place(encoder.encode, texts, places)
        is_byte = (ids >= len(SPECIAL_TOKENS)) & (ids < len(FIXED_TOKENS))
        ends = np.cumsum(lengths)
        total = np.concatenate([[0], np.cumsum(is_byte, dtype=np.int64)])
        results.append((ids, lengths, np.array([len(text) for text in texts], np.int64), total[ends] - total[ends - lengths], learnt))
    return results
