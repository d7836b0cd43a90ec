"""The content of report.json."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..shards import STARTS, Split, evenly
from ..tokenizer import Tokenizer
from . import report
from .deduplicate import RECORD, VALIDATION, chunks
from .job import SPLITS, Job

MEASURED_CHARACTERS = 1_000_000  # for the table of vocabulary sizes
PLACES = 100  # they are taken from


@dataclass(frozen=True)
class Result:
    """The results of the steps, for the report."""

    job: Job
    tokenizer: Tokenizer
    status: np.ndarray
    read: dict  # of `fingerprints`
    chosen: dict  # of `selection`
    encoded: dict  # of `encoding`

    def report(self, preset_sizes: Callable[[], Mapping[str, tuple[int, int]]]) -> dict:
        """The content of report.json."""
        job, files = self.job, self.job.files
        splits = [Split.open(job.out / name, verify=False) for name in SPLITS]
        characters, tokens = self._lengths(splits)
        return {
            "files": len(files),
            "bytes": sum(Path(f).stat().st_size for f in files if Path(f).is_file()),
            "documents_read": self.read["documents"],
            **{key: self.read[key] for key in ("normalised", "errors", "first_errors")},
            "selection": self.chosen,
            "options": asdict(job.options),
            "vocab_size": self.tokenizer.vocab_size,
            "splits": {
                name: {
                    "documents": split.n_documents,
                    "characters": split.characters,
                    "tokens": split.n_tokens,
                    "shards": len(split.shards),
                    "characters_per_token": split.characters / (split.n_tokens - split.n_documents),
                    "byte_fallback_share": n_bytes / (split.n_tokens - split.n_documents),
                }
                for name, split, n_bytes in zip(SPLITS, splits, self.encoded["byte_tokens"], strict=True)
            },
            "lengths": {"edges": [2 ** (i / 4) for i in range(65)], "characters": characters.tolist(), "tokens": tokens.tolist()},
            "vocabularies": [] if job.options.is_chat else self._vocabularies(splits, preset_sizes),
            "strangest": self.encoded["strangest"],
        }

    def _vocabularies(self, splits: list[Split], preset_sizes: Callable[[], Mapping[str, tuple[int, int]]]) -> list[dict]:
        job = self.job
        task = job.progress.add_task("comparing vocabularies", total=None)
        train = excerpts(splits[0], self.tokenizer, MEASURED_CHARACTERS)
        validation = excerpts(splits[1], self.tokenizer, MEASURED_CHARACTERS // 5)
        ((_, presets),) = job.workers.map(preset_sizes, [("the sizes of the models", ())])
        track = lambda done, total: job.progress.update(task, completed=done, total=total)
        return report.vocabulary_table(train, validation, presets, job.workers, track)

    def _lengths(self, splits: list[Split]) -> tuple[np.ndarray, np.ndarray]:
        # Histograms of the lengths in characters and tokens: four bars for each doubling.
        bars = lambda lengths: np.bincount(np.floor(4 * np.log2(np.maximum(lengths, 1))).astype(np.int64).clip(0, 63), minlength=64)
        characters, tokens = np.zeros(64, np.int64), np.zeros(64, np.int64)
        for first, records in chunks(self.job.documents, RECORD):
            characters += bars(records["characters"][self.status[first : first + len(records)] <= VALIDATION])
        for split in splits:
            last = np.empty(0, np.int64)
            for _, starts in chunks(split.folder / STARTS, split.starts.dtype):  # read, since mapped pages count as memory
                tokens += bars(np.diff(np.concatenate([last, starts])))
                last = starts[-1:]
        return characters, tokens


def excerpts(split: Split, tokenizer: Tokenizer, characters: int) -> list[str]:
    """At most about `characters` of a split, as documents at places evenly spread over it. Long documents are cut."""
    # Runs of documents, since each page of the mapped shards that is touched counts as memory.
    places = evenly(split.n_documents, PLACES)
    left, texts = round(split.n_tokens * characters / split.characters), []  # tokens
    for k, (first, stop) in enumerate(pairwise([*places, split.n_documents])):
        share = left // (len(places) - k)
        for document in range(first, stop):
            begin, end = split.starts[document : document + 2].tolist()
            if end - begin > share and document > first:
                break
            text = tokenizer.decode(split.take(np.arange(begin, min(end, begin + share))).tolist())
            texts.append(text.rstrip("\ufffd") if end - begin > share else text)  # no part of a character
            share, left = share - (end - begin), left - min(end - begin, share)
    return texts
