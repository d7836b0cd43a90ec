"""Exercises in copying: the answer repeats what was asked, a run of random entries of the vocabulary.

Copying the token after the last match takes two layers that work together (induction heads, arXiv 2209.11895). A small model does not form
them from stories. Where copying is the whole loss it does, after a plateau of 150 steps (docs/log.md).
"""

import re
from collections.abc import Iterator
from random import Random

from ..data.tokenizer import FIXED_TOKENS, Tokenizer
from .samples import Sample

COPIES = "copies.jsonl"
ENTRIES = (3, 16)  # of a run
TIMES = 2  # the answer repeats it, so that more of the tokens are learnt


def make_copies(tokenizer: Tokenizer, n: int, *, seed: int) -> Iterator[Sample]:
    """`n` conversations about runs of different entries of the vocabulary, those of letters. The same arguments give the same ones."""
    rng = Random(f"{seed} copies")
    texts = (tokenizer.decode([i]) for i in range(len(FIXED_TOKENS), tokenizer.vocab_size))
    entries = [text for text in texts if re.fullmatch(r"[^\W\d_]+", text)]
    for _ in range(n):
        run = "".join(rng.sample(entries, min(rng.randint(*ENTRIES), len(entries))))
        yield Sample(({"role": "user", "content": run}, {"role": "assistant", "content": TIMES * run}))
