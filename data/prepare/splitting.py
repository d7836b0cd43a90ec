"""Splitting documents into training and validation, and checking that none is in both.

The split of a document is a hash of its text (or of its group). It does not depend on the other documents, so adding data never moves a
document from validation to training.
"""

import math
from itertools import product
from pathlib import Path

import numpy as np

from ...common.errors import UserError
from . import deduplicate
from .deduplicate import BANDS, BLANK, RECORD, SIGNATURE, TRAIN, VALIDATION, are_near, band_keys, chunks, parts, rows_at


def threshold_of_fraction(fraction: float) -> int:
    """The threshold for a share of the documents: a document is held out if its split hash is lower."""
    return min(int(fraction * 2**64), 2**64 - 1)


def threshold_of_documents(path: Path, status: np.ndarray, documents: int) -> int:
    """The threshold that holds out `documents` of those that are kept so far, rounded up to complete groups.

    It is rounded up to a fraction of 53 bits, so that `threshold_of_fraction(threshold / 2**64)` holds out the same documents."""
    kept = lambda: (records["split_hash"][status[first : first + len(records)] == TRAIN] for first, records in chunks(path, RECORD))
    counts = np.zeros(1 << 16, np.int64)
    for hashes in kept():
        counts += np.bincount((hashes >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
    if documents >= counts.sum():
        raise UserError(f"--val-documents {documents} leaves none for training: there are {counts.sum():,} documents; give a lower number")
    bucket = int(np.searchsorted(np.cumsum(counts), documents))
    inside = np.sort(np.concatenate([hashes[hashes >> np.uint64(48) == bucket] for hashes in kept()]))
    last = int(inside[documents - int(counts[:bucket].sum()) - 1])
    fraction = (last + 1) / 2**64
    return threshold_of_fraction(fraction if fraction * 2**64 > last else math.nextafter(fraction, 1))


def count_exact_leaks(path: Path, n_documents: int, status: np.ndarray, threshold: int) -> tuple[int, int]:
    """Count the texts that are in both splits: (of all documents, of those that are kept). The first number is 0 without groups."""
    given = kept = 0
    for index, records in parts(path, n_documents, lambda first, r: status[first : first + len(r)] != BLANK):
        if not len(index):
            continue
        order = np.lexsort(records["hash"].T)
        hashes, is_held_out = records["hash"][order], records["split_hash"][order] < np.uint64(threshold)
        is_kept = status[index[order]] <= VALIDATION
        first = np.flatnonzero(np.concatenate([[True], (hashes[1:] != hashes[:-1]).any(1)]))  # of each run of equal texts
        contains = lambda chosen, first=first: np.logical_or.reduceat(chosen, first)
        given += int((contains(is_held_out) & contains(~is_held_out)).sum())
        kept += int((contains(is_held_out & is_kept) & contains(~is_held_out & is_kept)).sum())
    return given, kept


def count_near_leaks(path: Path, status: np.ndarray, threshold: float) -> int:
    """Count the near pairs with one kept document in each split; a pair counts once for each band in which it agrees."""
    held_out, found = np.flatnonzero(status == VALIDATION), 0
    blocks = [held_out[i : i + deduplicate.ROWS_AT_ONCE] for i in range(0, len(held_out), deduplicate.ROWS_AT_ONCE)]
    for block, band in product(blocks, range(BANDS)):
        keys = band_keys(rows_at(path, block), band)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for first, rows in chunks(path, SIGNATURE):
            train = np.flatnonzero(status[first : first + len(rows)] == TRAIN)
            key = band_keys(rows[train], band)
            begin, end = (np.searchsorted(keys, key, side) for side in ("left", "right"))
            counts = end - begin
            a = first + np.repeat(train, counts)
            b = block[order[np.repeat(begin - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())]]
            found += int(are_near(path, a, b, threshold).sum())
    return found
