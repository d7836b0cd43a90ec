"""Finding duplicates from fingerprints of the documents, in memory that does not grow with the text.

Equal texts are found by sorting their 128-bit hashes. Near duplicates are pairs whose MinHash signatures (over all runs of SHINGLE
characters) agree in at least a share `threshold` of their values, which estimates the Jaccard similarity. Compared are the pairs that agree
in all rows of one of BANDS bands. A pair with a similarity of 0.8 is compared with a probability of 1 - (1 - 0.8^6)^21 = 99.8 %, one with
0.9 with 1 - 1e-7.
"""

import hashlib
import mmap
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from ..tokenizer import END_OF_TEXT
from .documents import at_place

RECORD = np.dtype([("hash", "<u8", 2), ("split_hash", "<u8"), ("characters", "<u4")])  # characters 0: only white space
TRAIN, VALIDATION, EXACT, NEAR, BLANK = range(5)  # status of a document: its split, or why it is left out
SHINGLE = 5  # characters
ROWS, BANDS = 6, 21
PERMUTATIONS = 128  # ROWS × BANDS and two more, for the estimate
SIGNATURE = np.dtype(("<u2", PERMUTATIONS))  # the low 16 bits of each value: two that differ look equal once in 65,536 times
ROWS_AT_ONCE = 1 << 18
SORTED_AT_ONCE = 1 << 22  # documents sorted in memory; more are sorted in several passes
PAIRS_AT_ONCE = 1 << 14


def normalise(text: str) -> str:
    """NFC, and line ends as \\n; nothing else."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))


def fingerprints(texts: list[str], groups: list[str | None], places: list[str], is_near: bool) -> tuple[list[bytes], int, list[str]]:
    """The records, the signatures if `is_near`, the number of texts that `normalise` changes, and the places of `<|endoftext|>`."""
    normal = [normalise(text) for text in texts]
    records = np.array([record(text, group) for text, group in zip(normal, groups, strict=True)], RECORD)
    parts = [records.tobytes()] + ([at_place(signatures, normal, places).tobytes()] if is_near else [])
    marked = [place for text, place in zip(texts, places, strict=True) if END_OF_TEXT in text]
    return parts, sum(a != b for a, b in zip(texts, normal, strict=True)), marked


def record(text: str, group: str | None) -> tuple[tuple[int, int], int, int]:
    """The fields of RECORD for a document."""
    digest = hashlib.blake2b(text.encode(), digest_size=24).digest()
    a, b, split_hash = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
    if group is not None:
        split_hash = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "little")
    return (a, b), split_hash, 0 if text.isspace() else len(text)


def signatures(texts: list[str]) -> np.ndarray:
    """(documents,) SIGNATURE. Raises ImportError without rensa."""
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  # its stubs name less than it has

    codes = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4").astype(np.uint64)
    lengths = np.array([len(text) for text in texts])
    counts = np.maximum(lengths - SHINGLE + 1, lengths > 0)  # a shorter text is one shingle
    starts = np.cumsum(lengths) - lengths
    shingle = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    ends = np.repeat(starts + lengths, counts)
    hashes = np.zeros(len(shingle), np.uint64)
    for i in range(SHINGLE):
        at = shingle + i
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + np.where(at < ends, codes[np.minimum(at, len(codes) - 1)], np.uint64(0))
    hashes = (hashes ^ (hashes >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(29)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, 42)
    return np.array(matrix.to_rows(), np.uint32).astype("<u2")


def exact_duplicates(path: Path, n_documents: int, status: np.ndarray) -> None:
    """Mark in `status` all but one of the documents with the same text. The first of those with the lowest split hash is kept, so a text is
    held out if one of its copies is, whatever copies are added."""
    for index, records in parts(path, n_documents, lambda first, r: status[first : first + len(r)] == TRAIN):
        order = np.lexsort((records["split_hash"], records["hash"][:, 1], records["hash"][:, 0]))  # stable: equal ones stay in order
        hashes = records["hash"][order]
        status[index[order[1:][(hashes[1:] == hashes[:-1]).all(1)]]] = EXACT


def near_duplicates(path: Path, status: np.ndarray, threshold: float, track: Callable[[list], Iterable] = lambda items: items) -> int:
    """Mark in `status` each near duplicate of a document that is kept: of a pair across the splits the one in training, else the later one.
    Returns how many were near a document of the other split."""
    n_crossing = 0
    n_parts = -(-len(status) // SORTED_AT_ONCE)
    for band, part in track([(band, part) for band in range(BANDS) for part in range(n_parts)]):
        keys, index = [], []
        for first, rows in chunks(path, SIGNATURE):
            key = band_keys(rows, band)
            chosen = np.flatnonzero((status[first : first + len(rows)] <= VALIDATION) & (key % np.uint64(n_parts) == part))
            keys.append(key[chosen])
            index.append(first + chosen)
        keys, index = np.concatenate(keys), np.concatenate(index)
        order = np.lexsort((index, status[index] == TRAIN, keys))  # in a bucket: validation first, then in order
        keys, index = keys[order], index[order]
        # In each bucket the others are compared with the first, and the near ones are removed; then again with the first of the rest.
        while len(index):
            is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
            leader = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
            others = np.flatnonzero(~is_first)
            near = are_near(path, index[leader[others]], index[others], threshold)
            removed, kept = index[others[near]], index[leader[others[near]]]
            n_crossing += int((status[removed] != status[kept]).sum())
            status[removed] = NEAR
            keys, index = keys[others[~near]], index[others[~near]]
    return n_crossing


def chunks(path: Path, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, rows) over a file, in order."""
    first = 0
    with open(path, "rb") as file:
        while len(rows := np.fromfile(file, dtype, ROWS_AT_ONCE)):
            yield first, rows
            first += len(rows)


def parts(path: Path, n_documents: int, wanted: Callable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (index, records) of the wanted documents in parts small enough to sort; equal texts are in the same part."""
    n_parts = -(-n_documents // SORTED_AT_ONCE)
    for part in range(n_parts):
        index, found = [], []
        for first, records in chunks(path, RECORD):
            chosen = np.flatnonzero(wanted(first, records) & (records["hash"][:, 0] % np.uint64(n_parts) == part))
            index.append(first + chosen)
            found.append(records[chosen])
        if index:
            yield np.concatenate(index), np.concatenate(found)


def band_keys(rows: np.ndarray, band: int) -> np.ndarray:
    key = np.zeros(len(rows), np.uint64)
    for column in rows[:, band * ROWS : (band + 1) * ROWS].T:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(31)
    return key


def are_near(path: Path, a: np.ndarray, b: np.ndarray, threshold: float) -> np.ndarray:
    near = np.zeros(len(a), bool)
    for i in range(0, len(a), PAIRS_AT_ONCE):
        of = slice(i, i + PAIRS_AT_ONCE)
        near[of] = (rows_at(path, a[of]) == rows_at(path, b[of])).mean(1) >= threshold
    return near


def rows_at(path: Path, index: np.ndarray) -> np.ndarray:
    """Signatures at random places."""
    # Mapped again each time, so that pages that were read do not stay in memory.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, SIGNATURE.base).reshape(-1, PERMUTATIONS)[index]
