"""Splitting documents into training and validation, and checking that none is in both.

The split of a document is a hash of its text (or of its group). It does not depend on the other documents, so adding data never moves a
document from validation to training.
"""

import math
from pathlib import Path

import numpy as np

from ...common.errors import UserError
from . import deduplicate
from .deduplicate import BANDS, BLANK, PAIRS_AT_ONCE, RECORD, SIGNATURE, TRAIN, VALIDATION, band_keys, chunks, parts, rows_at


def threshold_of_fraction(fraction: float) -> int:
    """The threshold for a share of the documents: a document is held out if its split hash is lower."""
    return min(int(fraction * 2**64), 2**64 - 1)


def threshold_of_documents(path: Path, status: np.ndarray, documents: int) -> int:
    """The threshold that holds out `documents` of those that are kept so far, rounded up to complete groups.

    It is rounded up to a fraction of 53 bits, so that `threshold_of_fraction(threshold / 2**64)` holds out the same documents."""
    counts = np.zeros(1 << 16, np.int64)
    for first, records in chunks(path, RECORD):
        kept = status[first : first + len(records)] == TRAIN
        counts += np.bincount((records["split_hash"][kept] >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
    if documents >= counts.sum():
        raise UserError(f"--val-documents {documents} leaves none for training: there are {counts.sum():,} documents; give a lower number")
    bucket = int(np.searchsorted(np.cumsum(counts), documents))
    below = int(counts[:bucket].sum())
    inside = []
    for first, records in chunks(path, RECORD):
        kept = status[first : first + len(records)] == TRAIN
        hashes = records["split_hash"][kept]
        inside.append(hashes[hashes >> np.uint64(48) == bucket])
    last = int(np.sort(np.concatenate(inside))[documents - below - 1])
    fraction = (last + 1) / 2**64
    return threshold_of_fraction(fraction if fraction * 2**64 > last else math.nextafter(fraction, 1))


def count_exact_leaks(path: Path, n_documents: int, status: np.ndarray, threshold: int) -> tuple[int, int]:
    """Count the texts that are in both splits: (of all documents, of those that are kept). The first number is 0 without groups."""
    given = kept = 0
    for index, records in parts(path, n_documents, lambda first, r: status[first : first + len(r)] != BLANK):
        order = np.lexsort((records["hash"][:, 1], records["hash"][:, 0]))
        hashes = records["hash"][order]
        run = np.cumsum(np.concatenate([[False], (hashes[1:] != hashes[:-1]).any(1)]))
        is_validation = records["split_hash"][order] < np.uint64(threshold)
        is_kept = status[index[order]] <= VALIDATION
        n = int(run[-1]) + 1 if len(run) else 0

        for_all, for_kept = np.zeros((2, n), bool), np.zeros((2, n), bool)  # [split, run of equal texts]
        for split in (TRAIN, VALIDATION):
            for_all[split, run[is_validation == split]] = True
            for_kept[split, run[(is_validation == split) & is_kept]] = True
        given += int(for_all.all(0).sum())
        kept += int(for_kept.all(0).sum())
    return given, kept


def count_near_leaks(path: Path, status: np.ndarray, threshold: float) -> int:
    """Count the near pairs with one kept document in each split; a pair counts once for each band in which it agrees."""
    held_out = np.flatnonzero(status == VALIDATION)
    found = 0
    for block in range(0, len(held_out), deduplicate.ROWS_AT_ONCE):
        found += _near_pairs(path, status, rows_at(path, held_out[block : block + deduplicate.ROWS_AT_ONCE]), threshold)
    return found


def _near_pairs(path: Path, status: np.ndarray, held_out: np.ndarray, threshold: float) -> int:
    # `held_out`: signatures
    found = 0
    for band in range(BANDS):
        keys = band_keys(held_out, band)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for first, rows in chunks(path, SIGNATURE):
            train = np.flatnonzero(status[first : first + len(rows)] == TRAIN)
            key = band_keys(rows[train], band)
            begin, end = np.searchsorted(keys, key, "left"), np.searchsorted(keys, key, "right")
            counts = end - begin
            a = np.repeat(train, counts)
            b = order[np.repeat(begin - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())]
            for i in range(0, len(a), PAIRS_AT_ONCE):
                of = slice(i, i + PAIRS_AT_ONCE)
                found += int(((rows[a[of]] == held_out[b[of]]).mean(1) >= threshold).sum())
    return found
