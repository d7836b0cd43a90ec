"""Token ids on disk: raw little-endian arrays that are memory-mapped, beside a JSON index with their sizes and checksums.

A split (train, validation) is a folder:

    tokens-00000.bin …   the documents one after another, uint16, or uint32 for a vocabulary above 65,536; no document is cut in two
    starts.bin           int64, (documents + 1,): where each document begins, and last the number of tokens
    index.json           counts, tokenizer hash, and for each file its sha256

Each document begins with `<|endoftext|>`. A split is written in a folder aside and moved into place when all of it is on the disk, so a
writer that was killed leaves no split that looks whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from .tokenizer import Tokenizer

FORMAT, VERSION = "tritale-tokens", 1
INDEX, STARTS = "index.json", "starts.bin"
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
    entropy_bits: float | None  # of the whole split, where the process that made the text knows it
    vocab_size: int
    tokenizer_hash: str
    starts: np.ndarray  # (n_documents + 1,) int64, the last is n_tokens
    shards: tuple[np.ndarray, ...]  # each (tokens,) uint16 or uint32

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> "Split":
        """Map the split in `folder`. Sizes are always checked; `verify` also reads every file once and compares its sha256.

        Raises FileNotFoundError for a missing index or file; ValueError for a truncated or altered file, a split without documents, or
        one written in another version of the format.
        """
        folder = Path(folder)
        index = _read_index(folder / INDEX)
        try:
            shards = tuple(_map(folder, s, DTYPES[index["dtype"]], s["tokens"], verify) for s in index["shards"])
            starts = _map(folder, index["starts"], np.dtype("<i8"), index["documents"] + 1, verify)
            split = cls(
                folder=folder,
                n_tokens=index["tokens"],
                n_documents=index["documents"],
                characters=index["characters"],
                entropy_bits=index["entropy_bits"],
                vocab_size=index["vocab_size"],
                tokenizer_hash=index["tokenizer_hash"],
                starts=starts,
                shards=shards,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged ({type(error).__name__}: {error}); {REMEDY}") from error
        counts = {split.n_tokens, sum(map(len, shards)), int(starts[-1])}
        if len(counts) > 1:
            raise ValueError(f"{folder} disagrees with itself about the number of tokens: {sorted(counts)}; {REMEDY}")
        return split

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, `<|endoftext|>` included: (n_documents,) int64."""
        return np.diff(self.starts)

    def document(self, i: int) -> np.ndarray:
        """The tokens of document `i`, `<|endoftext|>` included: (tokens,) int64."""
        return self.take(np.arange(self.starts[i], self.starts[i + 1]))

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The tokens at `positions`, (n,) with 0 ≤ position ≤ n_tokens and n ≥ 1: (n,) int64.

        Position n_tokens stands for the `<|endoftext|>` that ends the last document, so `take(positions + 1)` are the targets of
        `take(positions)`.
        """
        positions = positions % self.n_tokens  # position 0 is an `<|endoftext|>`
        if len(self.shards) == 1:
            return self.shards[0][positions].astype(np.int64)
        shard_starts = np.cumsum([0, *map(len, self.shards[:-1])])
        shard_of = np.searchsorted(shard_starts, positions, side="right") - 1
        tokens = np.empty(positions.shape, np.int64)
        borders = np.flatnonzero(np.diff(shard_of)) + 1  # few: neighbours mostly lie in the same shard
        for i, j in pairwise([0, *borders, len(positions)]):
            shard = shard_of[i]
            tokens[i:j] = self.shards[shard][positions[i:j] - shard_starts[shard]]
        return tokens


def write_split(
    folder: str | Path,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    entropy_bits: float | Callable[[], float] | None = None,
    max_shard_tokens: int = 2**27,
) -> Split:
    """Tokenise `texts`, one document each, into a split at `folder`; a split that is already there is replaced.

    `texts` is read once and not kept, so it may be a generator over more text than fits in memory. `entropy_bits` is the information in
    all texts, where it is known: a number, or a function that is asked after the last text. A shard has at most `max_shard_tokens`
    tokens, unless a single document is longer.

    Raises ValueError if `texts` is empty, or if `folder` holds something that is not a split.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / INDEX).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a token split, so it is not overwritten; name another folder, or empty it")
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        index = _write_files(aside, iter(texts), tokenizer, max_shard_tokens)
        index["entropy_bits"] = entropy_bits() if callable(entropy_bits) else entropy_bits
        if not index["documents"]:
            raise ValueError(f"there are no documents to write to {folder}; check the input files and the filters on them")
        with _HashedFile(aside / INDEX) as file:
            file.write((json.dumps(index, indent=2) + "\n").encode())
        _sync_folder(aside)
        if folder.exists():
            (folder / INDEX).unlink(missing_ok=True)  # first: what is left of the old split is then no split
            shutil.rmtree(folder)
        aside.rename(folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Split.open(folder, verify=False)


def dtype_name(vocab_size: int) -> str:
    """The name of the type that ids of this vocabulary are stored in, a key of DTYPES."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _write_files(folder: Path, texts, tokenizer: Tokenizer, max_shard_tokens: int) -> dict:
    # Writes shards and starts; returns the index, but for `entropy_bits`.
    dtype = dtype_name(tokenizer.vocab_size)
    shards, shard, n_tokens, n_documents, characters = [], None, 0, 0, 0
    with _HashedFile(folder / STARTS) as starts:
        while batch := list(islice(texts, TEXTS_AT_ONCE)):
            characters += sum(map(len, batch))
            for ids in tokenizer.encode_batch(batch, bos=True):
                if shard is None or shards[-1]["tokens"] + len(ids) > max_shard_tokens:
                    if shard is not None:
                        shards[-1]["sha256"] = shard.close()
                    shards.append({"file": f"tokens-{len(shards):05d}.bin", "tokens": 0, "documents": 0})
                    shard = _HashedFile(folder / shards[-1]["file"])
                shard.write(np.array(ids, DTYPES[dtype]).tobytes())
                starts.write(np.array(n_tokens, "<i8").tobytes())
                n_tokens += len(ids)
                n_documents += 1
                shards[-1]["tokens"] += len(ids)
                shards[-1]["documents"] += 1
        if shard is not None:
            shards[-1]["sha256"] = shard.close()
        starts.write(np.array(n_tokens, "<i8").tobytes())
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "tokens": n_tokens,
        "documents": n_documents,
        "characters": characters,
        "shards": shards,
        "starts": {"file": STARTS, "sha256": starts.close()},
    }


class _HashedFile:
    # A new file that takes its sha256 while it is written and is on the disk for certain once closed.
    def __init__(self, path: Path):
        self._file = open(path, "xb")
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)

    def close(self) -> str:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return self._sha256.hexdigest()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _sync_folder(folder: Path) -> None:
    # Makes renames and new names inside `folder` durable. Windows has no such call.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_index(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: there is no finished token split; make one with write_split")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = index.get("format"), index.get("version")
        n_documents = index.get("documents")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {REMEDY}") from error
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} is in format {found[0]} version {found[1]}, this program reads {FORMAT} version {VERSION}; {REMEDY}")
    if n_documents == 0:
        raise ValueError(f"{path.parent} holds 0 documents; {REMEDY} with some text")
    return index


def _map(folder: Path, entry: dict, dtype: np.dtype, count: int, verify: bool) -> np.ndarray:
    path = folder / entry["file"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, though {INDEX} names it; restore it, or {REMEDY}")
    size, expected = path.stat().st_size, count * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes instead of {expected:,}; restore it, or {REMEDY}")
    array = np.asarray(np.memmap(path, dtype, mode="r"))
    if verify and (found := hashlib.sha256(array).hexdigest()) != entry["sha256"]:
        raise ValueError(f"{path} was altered: its sha256 is {found} instead of {entry['sha256']}; restore it, or {REMEDY}")
    return array
