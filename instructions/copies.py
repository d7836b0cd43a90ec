"""Exercises in copying: the answer repeats what was asked, a run of random entries of the vocabulary.

Copying the token after the last match takes two layers that work together (induction heads, arXiv 2209.11895). A small model does not form
them from stories. Where copying is most of the loss it does, after a plateau of 200 steps (docs/log.md).
"""

from collections.abc import Iterator
from random import Random

from ..data.tokenizer import Tokenizer
from .requirements import Requirement
from .samples import Sample, letter_ids

COPIES = "copies.jsonl"
ENTRIES = (3, 16)  # of a run
TIMES = 2  # the answer repeats it, so that more of the tokens are learnt


def make_copies(tokenizer: Tokenizer, n: int, *, seed: int) -> Iterator[Sample]:
    """`n` conversations about runs of different entries of the vocabulary, those of letters. The whole answer is emphasised. The same
    arguments give the same ones."""
    rng, letters = Random(f"{seed} copies"), letter_ids(tokenizer)
    for _ in range(n):
        run = tokenizer.decode(rng.sample(letters, min(rng.randint(*ENTRIES), len(letters))))
        messages = ({"role": "user", "content": run}, {"role": "assistant", "content": TIMES * run})
        yield Sample(messages, (Requirement("sentence", TIMES * run),))
