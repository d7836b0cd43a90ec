"""Exercises in copying: the answer is what was asked, and nothing but its beginning can be guessed."""

from tritale.data.tokenizer import Tokenizer
from tritale.instructions.copies import ENTRIES, TIMES, make_copies
from tritale.stories.generator import story


def test_an_answer_repeats_the_ids_that_were_asked():
    tokenizer = Tokenizer.train([story(1, i).text for i in range(200)], 600)
    copies = list(make_copies(tokenizer, 300, seed=4))
    assert copies == list(make_copies(tokenizer, 300, seed=4)) != list(make_copies(tokenizer, 300, seed=5))
    n_whole = 0
    for sample in copies:
        asked, answer = (message["content"] for message in sample.messages)
        assert answer == TIMES * asked and asked.isalpha()
        ids, repeated = tokenizer.encode(asked), tokenizer.encode(answer)
        assert len(ids) <= ENTRIES[1]  # entries of the vocabulary, which may merge
        n_whole += repeated == TIMES * ids
    assert n_whole > 280  # the end of one run merges with the beginning of the next in few
    assert {len(tokenizer.encode(sample.story)) for sample in copies} >= set(range(TIMES * 4, TIMES * 15, TIMES))
