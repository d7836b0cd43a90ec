"""What is derived from a text is true of it; instructions say it in several phrasings, in the language of the text."""

import random
import re

import pytest

from tritale.instructions.derive import SENTENCE, Vocabulary, length_range, of_text, split_sentences
from tritale.instructions.requirements import Requirement, judge
from tritale.instructions.wording import CHINESE, ENGLISH, ENGLISH_WORDING, SIMPLIFIED, TRADITIONAL, instruction, language_of
from tritale.stories.generator import story
from tritale.stories.words import CHARACTERS, PLACES, THINGS

NAMES = "lantern whistle orchard harbour blanket compass feather thunder".split()


def english_texts(seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        f"Once there was a {draw.choice(NAMES)}. It lay near the {draw.choice(NAMES)}, and nobody knew why! “Look at this,” said Tom."
        for _ in range(60)
    ]


def test_what_is_derived_from_a_text_is_met_by_it_and_words_are_its_own(seed):
    texts = [story(seed, i).text for i in range(200)]
    vocabulary, rng, n_words = Vocabulary(texts), random.Random(seed), 0
    assert len(vocabulary) > 40
    for text in texts:
        found = of_text(text, rng, vocabulary)
        assert {"feature", "length", "sentence"} <= found.keys()
        for requirement in found.values():
            assert judge(requirement, text) == (True, 1)
        n_words += "words" in found
        assert SENTENCE[0] <= len(found["sentence"].text) <= SENTENCE[1]
        assert not text.startswith(found["sentence"].text)
    assert n_words > 150


def test_words_are_found_without_a_dictionary_and_fragments_are_not(seed):
    texts = [story(seed, i).text for i in range(400)]
    vocabulary = Vocabulary(texts)
    names = [word.name for word in (*CHARACTERS, *THINGS, *PLACES)]
    said = {word for text in texts for word in vocabulary.important(text, n=99)}
    assert len(said & set(names)) > len(names) / 3
    assert not [word for word in said if any(name in word and name != word for name in names if len(name) > 2)]
    assert not [word for word in said if word[0] in "的了和在" or word[-1] in "的了和在"]
    assert vocabulary.important("天气很好。") == [] and vocabulary.important("") == []


def test_english_words_stand_alone_and_common_ones_are_left_out(seed):
    texts = english_texts(seed) + ["Nothing happened here at all."] * 300
    vocabulary = Vocabulary(texts)
    for text in texts[:60]:
        assert set(vocabulary.important(text)) <= set(NAMES) | {"once", "near", "nobody", "knew", "look", "this", "said", "there"}
        assert set(vocabulary.important(text)) & set(NAMES)
    assert "happened" not in vocabulary.important(texts[-1])


def test_sentences_keep_their_quotes_together():
    text = "小狗说：“走吧。我们去玩！”小兔笑了。他们走了……\n“好！”天黑了"
    assert split_sentences(text) == ["小兔笑了。", "他们走了……", "“好！”", "天黑了"]
    assert split_sentences("Dr. Fox is 3.5 years old. He runs!") == ["Dr.", "Fox is 3.5 years old.", "He runs!"]


@pytest.mark.parametrize("n", [1, 49, 50, 278, 499, 500, 501, 999, 5000, 123456])
def test_a_length_lies_in_its_range(n):
    low, high = length_range(n)
    assert 0 < low <= n <= high and high - low >= n // 11
    assert low % 50 == 0 or low == 1


def test_texts_without_anything_to_ask_for():
    rng = random.Random(0)
    assert of_text("", rng) == {} and of_text(" \n", rng) == {}
    assert of_text("啊", rng).keys() == {"length"}


def test_the_language_of_an_instruction_is_that_of_the_text():
    assert language_of("从前，有一个孩子，他们说话。") == SIMPLIFIED
    assert language_of("從前，有一個孩子，他們說話。") == TRADITIONAL
    assert language_of("小兔。") == SIMPLIFIED
    assert language_of("Once upon a time, 小兔 ran.") == ENGLISH


def test_an_instruction_names_every_requirement_in_order_and_in_several_phrasings(seed):
    rng = random.Random(seed)
    found = [
        Requirement("words", words=("风筝", "蜻蜓")), Requirement("people", words=("小兔", "豆豆")), Requirement("place", "山坡"),
        Requirement("summary", "他们飞上了天。", ("他们",)), Requirement("sentence", "天黑了！"), Requirement("beginning", "从前，"),
        Requirement("length", characters=(150, 200)),
    ]  # fmt: skip
    values = {r.kind: str(r.characters[0]) if r.characters else r.text or r.words[0] for r in found}
    for language in (SIMPLIFIED, TRADITIONAL, ENGLISH):
        texts = set()
        for _ in range(60):
            chosen = rng.sample(found, 3)
            text = instruction(tuple(chosen), language, rng)
            places = [text.index(values[r.kind]) for r in chosen]
            assert places == sorted(places) and "{" not in text
            assert all(word in text for r in chosen if not r.text for word in r.words)
            texts.add(re.sub("|".join(map(re.escape, values.values())), "", text))
        assert len(texts) > 30


def test_every_phrase_of_a_kind_differs_and_has_a_place_for_its_value():
    for wording in (CHINESE, ENGLISH_WORDING):
        for phrases in wording.clauses.values():
            assert len(set(phrases)) == len(phrases) >= 2 and all(phrase.count("{}") == 1 for phrase in phrases)
    traditional = {instruction((Requirement("feature", "转折"),), TRADITIONAL, random.Random(i)) for i in range(50)}
    assert all("转" not in text and "个" not in text and "写" not in text and "讲" not in text for text in traditional)


def test_a_sentence_with_quotes_is_quoted_with_other_marks():
    sentence = Requirement("sentence", "“好！”他说。")
    texts = {instruction((sentence,), SIMPLIFIED, random.Random(i)) for i in range(40)}
    assert all(sentence.text in text for text in texts) and any("《“好！”他说。》" in text for text in texts)
