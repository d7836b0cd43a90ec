"""Token ids on disk: raw little-endian arrays, memory-mapped, and a JSON index with their sizes and checksums.

A split (train, validation) is a folder:

    tokens-00000.bin …   the documents one after another, uint16, or uint32 for a vocabulary above 65,536; no document is in two files
    learnt-00000.bin …   of conversations only: uint8 for each token: 1 if it is learnt (the answers), 2 if it is emphasised there, else 0
    starts.bin           int64, (documents + 1,): where each document begins, and at the end the number of tokens
    index.json           format version, counts, tokenizer hash, and the sha256 of each file

Each document begins with `<|endoftext|>`. A split is written into a temporary folder, which is renamed when all of it is on the disk. So a
killed process leaves no incomplete split under its name.
"""

import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..common.errors import UserError
from ..common.files import read_json_object, sha256_of, sync_entries, sync_folder, write_json
from .tokenizer import Tokenizer

FORMAT, VERSION = "tritale-tokens", 2  # a split without learnt-….bin is written as version 1, which earlier versions of tritale read
INDEX, STARTS = "index.json", "starts.bin"
COUNTS = ("tokens", "documents", "characters")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
REMEDY = "delete the folder that holds it and make the data again"
TEXTS_AT_ONCE = 1024  # encoded in parallel; bounds the memory


@dataclass(frozen=True, eq=False)
class Split:
    """Tokenised documents on disk; made by `write_split` or `Split.open`."""

    folder: Path
    n_tokens: int
    n_documents: int
    characters: int
    entropy_bits: float | None  # of the split, if the process that made the text knows it
    vocab_size: int
    tokenizer_hash: str
    starts: np.ndarray  # (n_documents + 1,) int64, the last is n_tokens
    shards: tuple[np.ndarray, ...]  # each (tokens,) uint16 or uint32
    learnt: tuple[np.ndarray, ...] | None = None  # each (tokens,) uint8: 1 or 2 for a token that a model learns to write; None: all are

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> "Split":
        """Map the split in `folder`. The index and the sizes are always checked. `verify` also reads every file, compares its sha256 and
        checks its values.

        Raises FileNotFoundError for a missing file; UserError for a damaged one, another version of the format, or no documents."""
        folder = Path(folder)
        index = _read_index(folder / INDEX)
        dtype = DTYPES[index["dtype"]]
        shards = tuple(_map(folder, shard, dtype, shard["tokens"], verify) for shard in index["shards"])
        starts = _map(folder, index["starts"], np.dtype("<i8"), index["documents"] + 1, verify)
        flags = [_map(folder, s["learnt"], np.dtype("u1"), s["tokens"], verify) for s in index["shards"] if "learnt" in s]
        same = {key: index[key] for key in ("characters", "entropy_bits", "vocab_size", "tokenizer_hash")}
        split = cls(folder, index["tokens"], index["documents"], **same, starts=starts, shards=shards, learnt=tuple(flags) or None)
        counts = {split.n_tokens, sum(map(len, shards)), int(starts[-1])}
        if len(counts) > 1:
            raise UserError(f"{folder} has contradictory numbers of tokens: {sorted(counts)}; {REMEDY}")
        if verify and (starts[0] != 0 or not (starts[1:] > starts[:-1]).all()):
            raise UserError(f"{folder / STARTS} is damaged: the documents do not begin one after another; {REMEDY}")
        largest = max(int(shard.max()) for shard in shards) if verify else 0
        if largest >= split.vocab_size:
            raise UserError(f"{folder} has the token id {largest:,}, but its vocabulary has {split.vocab_size:,} entries; {REMEDY}")
        return split

    def is_of(self, tokenizer: Tokenizer) -> bool:
        """Whether it was made with this tokenizer."""
        return self.tokenizer_hash == tokenizer.hash and self.vocab_size == tokenizer.vocab_size

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, `<|endoftext|>` included: (n_documents,) int64."""
        return np.diff(self.starts)

    @property
    def has_pairs(self) -> bool:
        """Whether each document is a pair for preference training: the conversation with the chosen answer, then that with the rejected
        one, each after `<|endoftext|>`."""
        first = self.document(0)
        return self.learnt is not None and bool((first[1:] == first[0]).any())

    def document(self, i: int) -> np.ndarray:
        """The tokens of document `i`, `<|endoftext|>` included: (tokens,) int64."""
        return self.take(np.arange(self.starts[i], self.starts[i + 1]))

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The tokens at `positions`, (n,) with 0 ≤ position ≤ n_tokens and n ≥ 1: (n,) int64.

        Position n_tokens is the `<|endoftext|>` that ends the last document, so `take(positions + 1)` are the targets of
        `take(positions)`."""
        return self._take(self.shards, positions % self.n_tokens)  # position 0 is an `<|endoftext|>`

    def is_learnt(self, positions: np.ndarray) -> np.ndarray:
        """Whether a model learns to write the tokens at `positions`, as in `take`: (n,) bool."""
        if self.learnt is None:
            return np.ones(positions.shape, bool)
        return self._take(self.learnt, positions % self.n_tokens) != 0

    def is_emphasised(self, positions: np.ndarray) -> np.ndarray:
        """Whether the tokens at `positions`, as in `take`, may weigh more in the loss: (n,) bool."""
        if self.learnt is None:
            return np.zeros(positions.shape, bool)
        return self._take(self.learnt, positions % self.n_tokens) == 2

    def _take(self, arrays: tuple[np.ndarray, ...], positions: np.ndarray) -> np.ndarray:
        if len(arrays) == 1:
            return arrays[0][positions].astype(np.int64)
        shard_starts = np.cumsum([0, *map(len, arrays[:-1])])
        shard_of = np.searchsorted(shard_starts, positions, side="right") - 1
        tokens = np.empty(positions.shape, np.int64)
        borders = np.flatnonzero(np.diff(shard_of)) + 1  # few, since most neighbouring positions are in the same shard
        for i, j in pairwise([0, *borders, len(positions)]):
            shard = shard_of[i]
            tokens[i:j] = arrays[shard][positions[i:j] - shard_starts[shard]]
        return tokens


def with_replay(split: Split, replay: Split, share: float) -> Split:
    """Conversations and, in memory, documents of `replay`, evenly spread over it, all of whose tokens are learnt: about `share` of all
    tokens, or all that `replay` has. Raises UserError if the tokenizers differ."""
    if replay.tokenizer_hash != split.tokenizer_hash:
        raise UserError(f"{replay.folder} was made with another tokenizer than {split.folder}; make one of them again")
    wanted = round(share / (1 - share) * split.n_tokens / replay.n_tokens * replay.n_documents)
    documents = [replay.document(i) for i in evenly(replay.n_documents, wanted)]
    if not documents:
        return split
    added = np.concatenate(documents).astype(split.shards[0].dtype)
    return replace(
        split,
        n_tokens=split.n_tokens + len(added),
        n_documents=split.n_documents + len(documents),
        starts=np.concatenate([split.starts, split.n_tokens + np.cumsum([len(document) for document in documents])]),
        shards=(*split.shards, added),
        learnt=(*(split.learnt or (np.ones(len(s), np.uint8) for s in split.shards)), np.ones(len(added), np.uint8)),
    )


def write_split(
    folder: str | Path,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    entropy_bits: float | None = None,
    max_shard_tokens: int = 2**27,
) -> Split:
    """Tokenise `texts`, one document each, into a split at `folder`. An existing split is replaced.

    `texts` may be a generator over more text than fits in memory. `entropy_bits` is the entropy of all texts, if it is known. A shard has
    at most `max_shard_tokens` tokens, unless a single document is longer. Raises UserError as `SplitWriter` does."""
    writer = SplitWriter(folder, tokenizer, max_shard_tokens=max_shard_tokens)
    texts = iter(texts)
    try:
        while batch := list(islice(texts, TEXTS_AT_ONCE)):
            ids = tokenizer.encode_batch(batch, bos=True)
            lengths = np.array([len(i) for i in ids])
            writer.add(np.fromiter(chain.from_iterable(ids), writer.dtype), lengths, characters=sum(map(len, batch)))
        return writer.finish(entropy_bits)
    except BaseException:
        writer.abandon()
        raise


class SplitWriter:
    """Writes a split incrementally into `<folder>.partial`, which `finish` renames to `folder`.

    `commit` returns a state (JSON) with which a later process can resume. What was written after the commit is discarded."""

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        *,
        max_shard_tokens: int = 2**27,
        state: dict | None = None,
        has_learnt: bool = False,  # `add` gets which tokens are learnt
    ):
        """Resume from `state`, or begin a new split. Raises UserError if `folder` holds something else, or if the files lack what `state`
        says."""
        self.folder = Path(folder)
        if self.folder.exists() and not (self.folder / INDEX).is_file() and (self.folder.is_file() or any(self.folder.iterdir())):
            raise UserError(f"{folder} exists and is not a token split, so it is not overwritten; name another folder, or empty it")
        self._tokenizer, self._max_shard_tokens = tokenizer, max_shard_tokens
        self._dtype_name = dtype_name(tokenizer.vocab_size)
        self.dtype = DTYPES[self._dtype_name]
        self._partial = self.folder.with_name(f"{self.folder.name}.partial")
        self._shard: BinaryIO | None = None  # the last one of _state["shards"], while it is written
        self._learnt: BinaryIO | None = None  # beside it, if the split has one
        self._has_learnt = has_learnt
        if state is None:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        self._state = copy.deepcopy(state) or {"tokens": 0, "documents": 0, "characters": 0, "shards": []}
        shards = self._state["shards"]
        for path in self._partial.iterdir():
            if path.name not in (STARTS, *(shard["file"] for shard in shards), *(_learnt_name(i) for i in range(len(shards)))):
                path.unlink()
        self._starts = open_at(self._partial / STARTS, 8 * self._state["documents"])
        if shards and "sha256" not in shards[-1]:
            self._open_shard(shards[-1]["tokens"])

    def add(self, ids: np.ndarray, lengths: np.ndarray, characters: int, learnt: np.ndarray | None = None) -> None:
        """Append documents: `ids` (tokens,) in `dtype`, `lengths` (documents,) with lengths.sum() == tokens, `characters` in total, and
        `learnt` (tokens,) uint8 if the split has it."""
        state, shards = self._state, self._state["shards"]
        ends = np.cumsum(lengths)
        self._starts.write((state["tokens"] + ends - lengths).astype("<i8").tobytes())
        done, document = 0, 0  # tokens and documents of this call
        while document < len(lengths):
            room = self._max_shard_tokens - shards[-1]["tokens"] if self._shard else 0
            stop = int(np.searchsorted(ends, done + room, side="right"))
            if not self._shard or stop <= document:  # the next document does not fit
                self._close_shard()
                shards.append({"file": _shard_name(len(shards)), "tokens": 0, "documents": 0})
                self._open_shard(0)
                stop = max(document + 1, int(np.searchsorted(ends, done + self._max_shard_tokens, side="right")))
            end = int(ends[stop - 1])
            assert self._shard
            self._shard.write(ids[done:end].tobytes())
            if self._learnt and learnt is not None:
                self._learnt.write(learnt[done:end].tobytes())
            shards[-1]["tokens"] += end - done
            shards[-1]["documents"] += stop - document
            done, document = end, stop
        state["tokens"] += done
        state["documents"] += len(lengths)
        state["characters"] += characters

    def commit(self) -> dict:
        """Sync everything to the disk and return the state from which another writer can resume."""
        for file in filter(None, (self._starts, self._shard, self._learnt)):
            sync(file)
        sync_entries(self._partial)
        return copy.deepcopy(self._state)

    def finish(self, entropy_bits: float | None = None) -> Split:
        """Rename the split to its folder, in place of an existing one. Raises UserError if it has no documents."""
        if not self._state["documents"]:
            raise UserError(f"there are no documents to write to {self.folder}; check the input files and the filters on them")
        self._close_shard()
        self._starts.write(np.array(self._state["tokens"], "<i8").tobytes())
        self._starts.close()
        index = {
            "format": FORMAT,
            "version": VERSION if self._has_learnt else 1,
            "dtype": self._dtype_name,
            "vocab_size": self._tokenizer.vocab_size,
            "tokenizer_hash": self._tokenizer.hash,
            **self._state,
            "starts": {"file": STARTS, "sha256": sha256_of(self._partial / STARTS)},
            "entropy_bits": entropy_bits,
        }
        index["sha256"] = checksum(index)
        write_json(self._partial / INDEX, index)
        sync_folder(self._partial)
        if self.folder.exists():
            (self.folder / INDEX).unlink(missing_ok=True)  # first, so that an incomplete old split is not taken for a split
            shutil.rmtree(self.folder)
        self._partial.rename(self.folder)
        sync_entries(self.folder.parent)
        return Split.open(self.folder, verify=False)

    def abandon(self) -> None:
        """Remove everything that was written."""
        for file in filter(None, (self._starts, self._shard, self._learnt)):
            with suppress(OSError):  # a full disk
                file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _open_shard(self, tokens: int) -> None:
        name = self._state["shards"][-1]["file"]
        self._shard = open_at(self._partial / name, tokens * self.dtype.itemsize)
        if self._has_learnt:
            self._learnt = open_at(self._partial / _learnt_name(len(self._state["shards"]) - 1), tokens)

    def _close_shard(self) -> None:
        if self._shard:
            for file in filter(None, (self._shard, self._learnt)):
                sync(file)
                file.close()
            shard, learnt = self._state["shards"][-1], _learnt_name(len(self._state["shards"]) - 1)
            if self._learnt:
                shard["learnt"] = {"file": learnt, "sha256": sha256_of(self._partial / learnt)}
            self._shard = self._learnt = None
            shard["sha256"] = sha256_of(self._partial / shard["file"])


def dtype_name(vocab_size: int) -> str:
    """The type in which ids of this vocabulary are stored: a key of DTYPES."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def open_at(path: Path, size: int) -> BinaryIO:
    """Open a file for appending after its first `size` bytes, and cut off the rest. Raises UserError if it has fewer."""
    file = open(path, "r+b" if path.exists() else "xb")
    if (found := file.seek(0, os.SEEK_END)) < size:
        file.close()
        raise UserError(f"{path} has {found:,} bytes instead of at least {size:,}; {REMEDY}")
    file.truncate(size)
    file.seek(size)
    return file


def sync(file: BinaryIO) -> None:
    """Write what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _read_index(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: there is no finished token split; make the data again")
    index = read_json_object(path, remedy=REMEDY)
    version = index.get("version")
    if index.get("format") != FORMAT or type(version) is not int:
        raise UserError(f"{path} is not the index of a token split ({FORMAT}); {REMEDY}")
    if not 1 <= version <= VERSION:
        remedy = "update tritale" if version > VERSION else REMEDY
        raise UserError(f"{path} has version {version} of the format, this tritale reads versions up to {VERSION}; {remedy}")
    # Indexes written before there was a checksum have none. A key that is not known may be a damaged "sha256".
    names = {"format", "version", "dtype", "vocab_size", "tokenizer_hash", *COUNTS, "shards", "starts", "entropy_bits"}
    expected = index.pop("sha256") if "sha256" in index else checksum(index)
    if index.keys() != names or expected != checksum(index):
        raise UserError(f"{path} is damaged: its content does not match its checksum; {REMEDY}")
    if index["documents"] == 0:
        raise UserError(f"{path.parent} holds 0 documents; {REMEDY} with some text")
    is_count = lambda value: type(value) is int and 0 < value < 2**63
    is_file = lambda value, name: isinstance(value, dict) and value.get("file") == name and isinstance(value.get("sha256"), str)
    has_flags = lambda value, i: is_file(value.get("learnt"), _learnt_name(i)) if version == 2 else "learnt" not in value
    is_shard = lambda value, i: is_file(value, _shard_name(i)) and is_count(value.get("tokens")) and has_flags(value, i)
    checks = {
        "dtype": lambda value: isinstance(value, str) and value in DTYPES,
        "tokenizer_hash": lambda value: isinstance(value, str),
        "characters": lambda value: is_count(value) or (type(value) is int and value == 0),
        "shards": lambda value: isinstance(value, list) and value != [] and all(is_shard(s, i) for i, s in enumerate(value)),
        "starts": lambda value: is_file(value, STARTS),
        "entropy_bits": lambda value: value is None or (type(value) in (int, float) and 0 <= value < math.inf),
    }
    for name, check in ({"vocab_size": is_count} | dict.fromkeys(COUNTS, is_count) | checks).items():
        if not check(index[name]):
            raise UserError(f"{path} is damaged: {name} is {str(index[name])[:60]!r}; {REMEDY}")
    return index


def checksum(value: object) -> str:
    """The sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _shard_name(i: int) -> str:
    return f"tokens-{i:05d}.bin"


def _learnt_name(i: int) -> str:
    return f"learnt-{i:05d}.bin"


def _map(folder: Path, entry: dict, dtype: np.dtype, count: int, verify: bool) -> np.ndarray:
    path = folder / entry["file"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but {INDEX} lists it; restore it, or {REMEDY}")
    size, expected = path.stat().st_size, count * dtype.itemsize
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes instead of {expected:,}; restore it, or {REMEDY}")
    array = np.asarray(np.memmap(path, dtype, mode="r"))
    if verify and (found := hashlib.sha256(array.data).hexdigest()) != entry["sha256"]:
        raise UserError(f"{path} is damaged: its sha256 is {found} instead of {entry['sha256']}; restore it, or {REMEDY}")
    return array


def evenly(n: int, wanted: int) -> Sequence[int]:
    """`wanted` evenly spaced integers from 0 to n − 1; all of them if `wanted` is n or more."""
    return range(n) if n <= wanted else np.linspace(0, n - 1, wanted).astype(int).tolist()
