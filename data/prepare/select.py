"""Which documents are kept, and on which side: from the fingerprints alone, in memory that does not grow with the text.

A document's side is a hash of its text (or of its group): it does not depend on the other documents, so adding data never moves one
from validation to training. Equal texts are found by sorting their 128-bit hashes. Near duplicates are pairs whose MinHash signatures
(over all runs of SHINGLE characters) agree in at least a share `threshold` of their places, which estimates the Jaccard similarity;
candidates are the pairs that agree in all rows of one of BANDS bands. At a similarity of 0.8 such a pair is a candidate with
1 - (1 - 0.8^6)^21 = 99.8 %, at 0.9 with 1 - 1e-7.
"""

import math
import mmap
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np

from ...common.errors import UserError

RECORD = np.dtype([("hash", "<u8", 2), ("side", "<u8"), ("characters", "<u4")])  # characters 0: nothing but white space
TRAIN, VALIDATION, EXACT, NEAR, BLANK = range(5)  # what becomes of a document
SHINGLE = 5  # characters
ROWS, BANDS = 6, 21
PERMUTATIONS = 128  # ROWS × BANDS and two more, for the estimate
SIGNATURE = np.dtype(("<u2", PERMUTATIONS))  # the low 16 bits of each: two that differ look equal once in 65,536 times
ROWS_AT_ONCE = 1 << 18
SORTED_AT_ONCE = 1 << 22  # documents sorted in memory; more are taken in several passes
PAIRS_AT_ONCE = 1 << 14


def signatures(texts: list[str]) -> np.ndarray:
    """(documents,) SIGNATURE. Raises ImportError without rensa."""
    from rensa import RMinHash

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


def threshold_of_fraction(fraction: float) -> int:
    """A document is held out if its side is below this number of 64 bits."""
    return min(int(fraction * 2**64), 2**64 - 1)


def threshold_of_documents(path: Path, fates: np.ndarray, documents: int) -> int:
    """The threshold that holds out `documents` of those that `fates` keeps (a whole group more where the last one is in a group). It is
    the next one that a fraction of 53 bits can name, so that `threshold_of_fraction(threshold / 2**64)` holds out the same."""
    counts = np.zeros(1 << 16, np.int64)
    for first, records in chunks(path, RECORD):
        kept = fates[first : first + len(records)] == TRAIN
        counts += np.bincount((records["side"][kept] >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
    if documents >= counts.sum():
        raise UserError(f"--val-documents {documents} leaves none for training: there are {counts.sum():,} documents; ask for fewer")
    bucket = int(np.searchsorted(np.cumsum(counts), documents))
    below = int(counts[:bucket].sum())
    inside = []
    for first, records in chunks(path, RECORD):
        kept = fates[first : first + len(records)] == TRAIN
        sides = records["side"][kept]
        inside.append(sides[sides >> np.uint64(48) == bucket])
    last = int(np.sort(np.concatenate(inside))[documents - below - 1])
    fraction = (last + 1) / 2**64
    return threshold_of_fraction(fraction if fraction * 2**64 > last else math.nextafter(fraction, 1))


def exact_duplicates(path: Path, n_documents: int, fates: np.ndarray) -> None:
    """Mark in `fates` all but one of the documents with the same text: the one of the lowest side stays, and of those in the same group the
    first. So a text is held out if one of its copies is, whatever copies are added."""
    for index, records in _parts(path, n_documents, lambda first, r: fates[first : first + len(r)] == TRAIN):
        order = np.lexsort((records["side"], records["hash"][:, 1], records["hash"][:, 0]))  # stable: equal ones stay in order
        hashes = records["hash"][order]
        fates[index[order[1:][(hashes[1:] == hashes[:-1]).all(1)]]] = EXACT


def count_exact_leaks(path: Path, n_documents: int, fates: np.ndarray, threshold: int) -> tuple[int, int]:
    """Texts that are on both sides: (in the data as given, in what is kept). The first is not 0 only with groups."""
    given = kept = 0
    for index, records in _parts(path, n_documents, lambda first, r: fates[first : first + len(r)] != BLANK):
        order = np.lexsort((records["hash"][:, 1], records["hash"][:, 0]))
        hashes = records["hash"][order]
        run = np.cumsum(np.concatenate([[False], (hashes[1:] != hashes[:-1]).any(1)]))
        is_validation = records["side"][order] < np.uint64(threshold)
        fate = fates[index[order]]
        n = int(run[-1]) + 1 if len(run) else 0

        for_all, for_kept = np.zeros((2, n), bool), np.zeros((2, n), bool)  # is a text of this run on this side?
        for side in (0, 1):
            for_all[side, run[is_validation == side]] = True
            for_kept[side, run[(is_validation == side) & (fate <= VALIDATION)]] = True
        given += int(for_all.all(0).sum())
        kept += int(for_kept.all(0).sum())
    return given, kept


def near_duplicates(path: Path, fates: np.ndarray, threshold: float, track: Callable = lambda items: items) -> int:
    """Mark in `fates` each document that is near to another that is kept: of a pair that lies on both sides the one in training, else
    the later one. Returns how many were near one of the other side."""
    n_crossing = 0
    n_parts = -(-len(fates) // SORTED_AT_ONCE)
    for band, part in track([(band, part) for band in range(BANDS) for part in range(n_parts)]):
        keys, index = [], []
        for first, rows in chunks(path, SIGNATURE):
            key = _band_keys(rows, band)
            chosen = np.flatnonzero((fates[first : first + len(rows)] <= VALIDATION) & (key % np.uint64(n_parts) == part))
            keys.append(key[chosen])
            index.append(first + chosen)
        keys, index = np.concatenate(keys), np.concatenate(index)
        order = np.lexsort((index, fates[index] == TRAIN, keys))  # in a bucket: validation first, then in order
        keys, index = keys[order], index[order]
        # In every bucket its first is compared with all others, which fall if they are near; then the first of those left, and so on.
        while len(index):
            is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
            leader = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
            others = np.flatnonzero(~is_first)
            near = _are_near(path, index[leader[others]], index[others], threshold)
            fallen, by = index[others[near]], index[leader[others[near]]]
            n_crossing += int((fates[fallen] != fates[by]).sum())
            fates[fallen] = NEAR
            keys, index = keys[others[~near]], index[others[~near]]
    return n_crossing


def count_near_leaks(path: Path, fates: np.ndarray, threshold: float) -> int:
    """Pairs of a kept document of each side that are near (one pair counts once for each band it shares), found from validation."""
    held_out = np.flatnonzero(fates == VALIDATION)
    found = 0
    for block, band in product(range(0, len(held_out), ROWS_AT_ONCE), range(BANDS)):
        if band == 0:
            own = _rows(path, held_out[block : block + ROWS_AT_ONCE])
        keys = _band_keys(own, band)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for first, rows in chunks(path, SIGNATURE):
            train = np.flatnonzero(fates[first : first + len(rows)] == TRAIN)
            key = _band_keys(rows[train], band)
            begin, end = np.searchsorted(keys, key, "left"), np.searchsorted(keys, key, "right")
            counts = end - begin
            a = np.repeat(train, counts)
            b = order[np.repeat(begin - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())]
            for i in range(0, len(a), PAIRS_AT_ONCE):
                of = slice(i, i + PAIRS_AT_ONCE)
                found += int(((rows[a[of]] == own[b[of]]).mean(1) >= threshold).sum())
    return found


def chunks(path: Path, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, rows) over a file, in order."""
    first = 0
    with open(path, "rb") as file:
        while len(rows := np.fromfile(file, dtype, ROWS_AT_ONCE)):
            yield first, rows
            first += len(rows)


def _parts(path: Path, n_documents: int, wanted) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    # (numbers, records) of the wanted documents, those with equal texts together, few enough to sort.
    n_parts = -(-n_documents // SORTED_AT_ONCE)
    for part in range(n_parts):
        index, found = [], []
        for first, records in chunks(path, RECORD):
            chosen = np.flatnonzero(wanted(first, records) & (records["hash"][:, 0] % np.uint64(n_parts) == part))
            index.append(first + chosen)
            found.append(records[chosen])
        if index:
            yield np.concatenate(index), np.concatenate(found)


def _band_keys(rows: np.ndarray, band: int) -> np.ndarray:
    key = np.zeros(len(rows), np.uint64)
    for column in rows[:, band * ROWS : (band + 1) * ROWS].T:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(31)
    return key


def _are_near(path: Path, a: np.ndarray, b: np.ndarray, threshold: float) -> np.ndarray:
    near = np.zeros(len(a), bool)
    for i in range(0, len(a), PAIRS_AT_ONCE):
        of = slice(i, i + PAIRS_AT_ONCE)
        near[of] = (_rows(path, a[of]) == _rows(path, b[of])).mean(1) >= threshold
    return near


def _rows(path: Path, index: np.ndarray) -> np.ndarray:
    # Rows at random places. Mapped anew each time, so that pages that were read do not stay in memory.
    mapped = np.memmap(path, SIGNATURE.base, mode="r").reshape(-1, PERMUTATIONS)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped._mmap.madvise(mmap.MADV_RANDOM)
    return np.asarray(mapped[index])
