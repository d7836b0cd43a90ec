"""Exercises in copying: what the answer repeats cannot be guessed, but stands in the instruction."""

from itertools import islice

import pytest

from tritale.data.tokenizer import Tokenizer
from tritale.instructions.copies import ALTERED_TOKENS, ALTERED_WORDS, ENTRIES, TIMES, make_copies
from tritale.instructions.derive import of_built_in
from tritale.instructions.samples import Stories, make_samples
from tritale.stories.generator import story

STORIES = Stories(300, lambda i: (story(1, i).text, lambda rng: of_built_in(story(1, i), rng)), True)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([story(1, i).text for i in range(300)], 3000)


def test_an_answer_repeats_the_ids_that_were_asked(tokenizer):
    samples = list(make_samples(STORIES, 300, seed=4))
    copies = list(make_copies(tokenizer, samples, seed=4))
    assert copies == list(make_copies(tokenizer, samples, seed=4)) != list(make_copies(tokenizer, samples, seed=5))
    n_whole = 0
    for sample in copies[::2]:
        asked, answer = (message["content"] for message in sample.messages)
        assert answer == TIMES * asked and asked.isalpha() and sample.emphasis == [(0, len(answer))]
        ids, repeated = tokenizer.encode(asked), tokenizer.encode(answer)
        assert len(ids) <= ENTRIES[1]  # entries of the vocabulary, which may merge
        n_whole += repeated == TIMES * ids
    assert n_whole > 280  # the end of one run merges with the beginning of the next in few
    assert {len(tokenizer.encode(sample.story)) for sample in copies[::2]} >= set(range(TIMES * 4, TIMES * 15, TIMES))


def test_altered_words_and_sentences_are_the_same_in_the_instruction_and_in_the_story(tokenizer, seed):
    samples = list(make_samples(STORIES, 300, seed=seed))
    n, n_changed = {"words": 0, "sentence": 0}, {"words": 0, "sentence": 0}
    for sample, altered in zip(samples, islice(make_copies(tokenizer, samples, seed=seed), 1, None, 2), strict=True):
        assert all(verdict.is_met for r, verdict in zip(altered.requirements, altered.judge(altered.story), strict=True) if r.kind in n)
        for before, after in zip(sample.requirements, altered.requirements, strict=True):
            assert (before.kind == after.kind and all(word in altered.prompt[0]["content"] for word in after.words or (after.text,))) or (
                after.kind in ("length", "feature", "summary")
            )
            if before.kind == "words":
                n["words"] += len(before.words)
                n_changed["words"] += sum(a != b for a, b in zip(before.words, after.words, strict=True))
            elif before.kind == "sentence":
                n["sentence"] += 1
                n_changed["sentence"] += before.text != after.text
    assert abs(n_changed["words"] / n["words"] - ALTERED_WORDS) < 0.15 and n_changed["sentence"] / n["sentence"] > 1 - ALTERED_TOKENS
