"""All measures of a generated story and their means, for sweep and evaluate."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean

from ..data.shards import Split, evenly
from ..data.tokenizer import Tokenizer
from ..stories.facts import cast
from .measures import CorpusIndex, distinct, ends_properly, longest_loop, repeated_share

OVERLAP_CHARACTERS = 8_000_000  # of the training text that are searched for copies; building their index takes 400 MB and 5 s
REPEATS = 0.05  # share of repeated 4-grams below which a story is coherent
SHORTEST = 0.5  # length of the shortest coherent story, relative to the shortest held-out one


class StoryMeasures:
    """Measures stories against the texts of the training split and held-out stories. `checks_cast`: they are built-in stories, or of a
    model that was trained on them, whose characters and things are known."""

    def __init__(self, train_texts: Sequence[str], held_out: Sequence[str], *, checks_cast: bool):
        self._index = CorpusIndex(train_texts)
        self.checks_cast = checks_cast
        self.shortest_coherent = math.ceil(SHORTEST * min(map(len, held_out)))

    def story(self, prompt: str, text: str, *, is_complete: bool) -> dict:
        """The measures of the `text` that continues `prompt`. `is_complete`: the model ended it."""
        # Repetition, loop and overlap measure the generated text; ending, cast and minimum length the prompt with it. The cast is
        # consistent only if the generated text itself names a hero.
        whole, loop = prompt + text, longest_loop(text)
        found = cast(whole) if self.checks_cast else None
        repeated = repeated_share(text)
        is_proper, is_consistent = is_complete and ends_properly(whole), found and found.is_consistent and bool(cast(text).heroes)
        is_long_enough = len(whole) >= self.shortest_coherent
        return {
            "repeated_4grams": repeated,
            "loop": [loop.start, loop.end, loop.piece] if loop else None,
            "ends_properly": is_proper,
            "overlap": list(self._index.longest_overlap(text)),
            "cast": found and asdict(found),
            "is_consistent": is_consistent,
            "is_coherent": is_proper and is_long_enough and repeated < REPEATS and is_consistent is not False,
        }

    def means(self, stories: Sequence[dict]) -> dict:
        """Over the dictionaries of `story`, each with its `text`."""
        loops = [s["loop"][1] - s["loop"][0] if s["loop"] else 0 for s in stories]
        overlaps = [s["overlap"][1] - s["overlap"][0] for s in stories]
        return {
            "repeated_4grams": mean(s["repeated_4grams"] for s in stories),
            "longest_loop": mean(loops),
            "longest_loop_max": max(loops),
            "length": mean(len(s["text"]) for s in stories),
            "ends_properly": mean(s["ends_properly"] for s in stories),
            "consistent": mean(s["is_consistent"] for s in stories) if self.checks_cast else None,
            "coherent": mean(s["is_coherent"] for s in stories),
            "overlap": mean(overlaps),
            "overlap_max": max(overlaps),
        }


def part_of_text(train: Split, tokenizer: Tokenizer) -> list[str]:
    """Evenly spread documents of a split, OVERLAP_CHARACTERS in all or the whole split."""
    n_documents = max(1, int(train.n_documents * min(1, OVERLAP_CHARACTERS / train.characters)))
    return [decode(train, i, tokenizer) for i in evenly(train.n_documents, n_documents)]


def decode(split: Split, i: int, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(split.document(i).tolist())


def distinct_n(texts: list[str]) -> dict:
    return {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)}
