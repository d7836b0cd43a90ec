"""Measures of a story that need no model: repetition, loops, diversity, ending, and overlap with a corpus.

Lengths are in characters (Unicode code points), so measures compare across tokenizers. Repetition ignores white space.
"""

import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

ENDS = "。！？!?.…"
CLOSING = "”’」』\"')）》"  # may follow the mark that ends a sentence


def repeated_share(text: str, n: int = 4) -> float:
    """The share of the text's n-grams of characters that occur earlier in it: 0 without repetition, near 1 in a loop."""
    text = re.sub(r"\s", "", text)
    total = len(text) - n + 1
    return 1 - len({text[i : i + n] for i in range(total)}) / total if total > 0 else 0.0


def distinct(texts: Iterable[str], n: int) -> float:
    """Distinct-n (Li et al. 2016, arXiv 1510.03055): different n-grams of characters divided by all n-grams of all texts, or 0 without any.

    It falls with the amount of text, so compare only equal amounts."""
    grams, total = set(), 0
    for text in texts:
        text = re.sub(r"\s", "", text)
        grams.update(text[i : i + n] for i in range(len(text) - n + 1))
        total += max(0, len(text) - n + 1)
    return len(grams) / total if total else 0.0


@dataclass(frozen=True)
class Loop:
    """A stretch of a text, from `start` to `end`, that repeats `piece` at least twice without a gap."""

    start: int
    end: int
    piece: str

    @property
    def length(self) -> int:
        return self.end - self.start


def longest_loop(text: str) -> Loop | None:
    """The longest stretch `uu…u` of the text, with at least two complete `u`; the last one may be cut. None if there is no such stretch.

    Of equally long stretches, the one with the shortest `u`. The time is quadratic in the length: 1 ms for 300 characters."""
    codes, best = np.array([ord(c) for c in text], np.int32), None
    n = len(codes)
    for period in range(1, n // 2 + 1):
        differs = np.flatnonzero(codes[period:] != codes[:-period])
        borders = np.concatenate([[-1], differs, [n - period]])
        runs = np.diff(borders) - 1  # lengths of the runs of positions that equal the one a period later
        at = int(runs.argmax())
        if runs[at] >= period and (best is None or runs[at] + period > best.length):
            start = int(borders[at]) + 1
            best = Loop(start, start + int(runs[at]) + period, text[start : start + period])
    return best


def ends_properly(text: str) -> bool:
    """Whether the last sentence is complete: the text ends with a mark of ENDS, which closing quotes may follow."""
    return text.rstrip().rstrip(CLOSING)[-1:] in tuple(ENDS)


BREAK = "\ud800"  # separates documents; text decoded from UTF-8 never contains it


class CorpusIndex:
    """A suffix array over a corpus, for the longest stretch of a text that occurs in it.

    Building takes 50 bytes per character and 0.6 s per million characters; the index keeps 6 bytes per character. A text of 250 characters
    takes 2 ms."""

    def __init__(self, documents: Iterable[str]):
        self._text = BREAK.join(documents) + BREAK
        self._suffixes = array("i", _suffix_array(self._text).astype(np.intc).tobytes())

    def _find(self, piece: str) -> int | None:
        # The start of an occurrence of `piece` in the corpus.
        text, n = self._text, len(piece)
        i = bisect_left(self._suffixes, piece, key=lambda start: text[start : start + n])
        if i < len(self._suffixes) and text.startswith(piece, self._suffixes[i]):
            return self._suffixes[i]
        return None

    def longest_overlap(self, text: str) -> tuple[int, int]:
        """(start, end) of the longest stretch of `text` that occurs in one document of the corpus, or the first of several."""
        best = (0, 0)
        for i in range(len(text)):
            n = best[1] - best[0] + 1
            while i + n <= len(text) and (found := self._find(text[i : i + n])) is not None:
                while i + n < len(text) and self._text[found + n] == text[i + n]:
                    n += 1
                best = (i, i + n)
                n += 1
        return best


def _suffix_array(text: str) -> np.ndarray:
    # The starts of the suffixes of `text` in sorted order, (len(text),) int64, by prefix doubling (Manber & Myers 1990): the ranks by the
    # first k characters at two positions give the order by 2 k. It begins with k = 3, since three characters fit into one int64.
    n = len(text)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64) + 1
    padded = np.concatenate([codes, [0, 0]])
    key, k = (padded[:-2] << 42) | (padded[1:-1] << 21) | padded[2:], 3
    while True:
        order = np.argsort(key)
        ordered = key[order]
        rank = np.empty(n, np.int64)
        rank[order] = np.cumsum(np.concatenate([[1], ordered[1:] != ordered[:-1]]))
        if n == 0 or rank[order[-1]] == n:
            return order
        shifted = np.zeros(n, np.int64)
        shifted[: max(0, n - k)] = rank[k:]
        key, k = (rank << 32) | shifted, 2 * k


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a probability after k successes in n ≥ 1 trials (Wilson 1927)."""
    z, p = 1.959964, k / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))
