"""Exercises in copying: the answer repeats what was asked, a run of random entries of the vocabulary.

Copying the token after the last match takes two layers that work together (induction heads, arXiv 2209.11895). A small model does not form
them from stories. Where copying is most of the loss it does, after a plateau of 150 steps (docs/log.md).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

from ..common.files import atomic_file
from ..data.tokenizer import FIXED_TOKENS, Tokenizer

COPIES = "copies.jsonl"
ENTRIES = (3, 16)  # of a run
TIMES = 2  # the answer repeats it, so that more of the tokens are learnt


def make_copies(tokenizer: Tokenizer, n: int, *, seed: int) -> Iterator[dict]:
    """`n` records for training, about runs of different entries of the vocabulary that consist of letters. The whole answer is emphasised.
    The same arguments give the same records."""
    rng = Random(f"{seed} copies")
    texts = (tokenizer.decode([i]) for i in range(len(FIXED_TOKENS), tokenizer.vocab_size))
    entries = [text for text in texts if re.fullmatch(r"[^\W\d_]+", text)]
    for _ in range(n):
        run = "".join(rng.sample(entries, min(rng.randint(*ENTRIES), len(entries))))
        messages = [{"role": "user", "content": run}, {"role": "assistant", "content": TIMES * run}]
        yield {"messages": messages, "emphasis": [[0, TIMES * len(run)]]}


def write_copies(path: Path, tokenizer: Tokenizer, n: int, *, seed: int) -> None:
    """Write the records of `make_copies`, one a line."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in make_copies(tokenizer, n, seed=seed))
