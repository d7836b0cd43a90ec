"""Exercises in copying: what was asked, made of random entries of the vocabulary, is repeated, or stands in a story.

Copying the token after the last match takes two layers that work together (induction heads, arXiv 2209.11895). A small model does not form
them from stories. Where copying is most of the loss it does, after a plateau of 200 steps (docs/log.md).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from random import Random

from ..data.tokenizer import FIXED_TOKENS, Tokenizer
from .requirements import Requirement
from .samples import Sample

COPIES = "copies.jsonl"
ENTRIES = (3, 16)  # of a run
TIMES = 2  # the answer repeats it, so that more of the tokens are learnt
ALTERED_WORDS, ALTERED_TOKENS = 0.5, 0.3  # shares of the required words, and of the tokens of a required sentence, that are altered


def make_copies(tokenizer: Tokenizer, samples: Iterable[Sample], *, seed: int) -> Iterator[Sample]:
    """Two exercises for each sample, one after the other. The same arguments give the same ones.

    One is about a run of different entries of the vocabulary, those of letters: the answer repeats it, and all of it is emphasised. The
    other one is the sample with some of the required words, and of the tokens of a required sentence, replaced by such entries, in the
    instruction and in the story: the model cannot guess them from the story, it has to copy them."""
    rng = Random(f"{seed} copies")
    letters = [i for i in range(len(FIXED_TOKENS), tokenizer.vocab_size) if re.fullmatch(r"[^\W\d_]+", tokenizer.decode([i]))]
    for sample in samples:
        run = tokenizer.decode(rng.sample(letters, min(rng.randint(*ENTRIES), len(letters))))
        messages = ({"role": "user", "content": run}, {"role": "assistant", "content": TIMES * run})
        yield Sample(messages, (Requirement("sentence", TIMES * run),))
        yield _altered(sample, tokenizer, letters, rng)


def _altered(sample: Sample, tokenizer: Tokenizer, letters: list[int], rng: Random) -> Sample:
    new = {}
    for r in sample.requirements:
        if r.kind == "words":
            new |= {word: tokenizer.decode([rng.choice(letters)]) for word in r.words if rng.random() < ALTERED_WORDS}
        if r.kind == "sentence":
            ids = [i if rng.random() >= ALTERED_TOKENS else rng.choice(letters) for i in tokenizer.encode(r.text)]
            if "\ufffd" not in tokenizer.decode(ids):  # half a character was replaced
                new[r.text] = tokenizer.decode(ids)
    if not new:
        return sample
    pattern = re.compile("|".join(map(re.escape, sorted(new, key=len, reverse=True))))
    change = lambda text: pattern.sub(lambda found: new[found[0]], text)
    requirements = tuple(replace(r, text=change(r.text), words=tuple(map(change, r.words))) for r in sample.requirements)
    return replace(sample, messages=tuple({**m, "content": change(m["content"])} for m in sample.messages), requirements=requirements)
