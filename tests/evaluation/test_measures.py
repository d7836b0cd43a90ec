"""The measures of a story, against plain definitions on random texts, and on stories whose fault is known."""

import random

import pytest

from tritale.evaluation.measures import CorpusIndex, distinct, ends_properly, longest_loop, repeated_share


def random_text(rng: random.Random, n: int, letters: str = "小明ab。") -> str:
    return "".join(rng.choice(letters) for _ in range(n))


def loop_length_by_definition(text: str) -> int:
    """Longest text[i:j] with a period of at most half its length, tried for every i, j."""
    best = 0
    for i in range(len(text)):
        for j in range(i + 2, len(text) + 1):
            part = text[i:j]
            if any(part[:-p] == part[p:] for p in range(1, len(part) // 2 + 1)):
                best = max(best, len(part))
    return best


def test_longest_loop_is_the_longest_of_all_stretches(seed):
    rng = random.Random(seed)
    for _ in range(40):
        text = random_text(rng, rng.randrange(0, 24), "ab甲")
        found = longest_loop(text)
        assert (found.length if found else 0) == loop_length_by_definition(text), text
        if found:
            stretch = text[found.start : found.end]
            assert (found.piece * len(stretch))[: len(stretch)] == stretch and len(stretch) >= 2 * len(found.piece)


def test_a_planted_loop_is_found_with_its_piece_and_place(seed):
    rng = random.Random(seed)
    before, piece = "从前有个人。", f"男人问：“你们想要什么{rng.randrange(10)}？”"
    found = longest_loop(before + piece * 4 + "好")
    assert found and (found.piece, found.start, found.length) == (piece, len(before), 4 * len(piece))
    assert longest_loop("") is None and longest_loop("小兔跑") is None


def test_repetition_is_none_in_new_text_and_nearly_all_in_a_loop():
    assert repeated_share("甲乙丙丁戊己庚辛") == 0
    assert repeated_share("你好吗？" * 50) == pytest.approx(1 - 4 / 197)
    assert repeated_share("abcdabcd") == pytest.approx(1 / 5)
    assert repeated_share("abc") == 0 and repeated_share("ab\ncd ab\ncd") == pytest.approx(1 / 5)  # white space does not hide it


def test_distinct_counts_over_all_texts_together():
    assert distinct(["aab", "ab"], 1) == pytest.approx(2 / 5)
    assert distinct(["aab", "ab"], 2) == pytest.approx(2 / 3)
    assert distinct(["a"], 2) == 0 and distinct([], 1) == 0


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("他笑了。", True),
        ("“好！”", True),
        ("结束。\n", True),
        ("他说（是吗？）", True),
        ("他笑了，", False),
        ("他", False),
        ("", False),
        ("”", False),
    ],
)
def test_proper_endings(text, whole):
    assert ends_properly(text) is whole


def test_longest_overlap_is_that_of_plain_search(seed):
    rng = random.Random(seed)
    for _ in range(15):
        documents = [random_text(rng, rng.randrange(0, 60)) for _ in range(rng.randrange(1, 6))]
        index = CorpusIndex(documents)
        text = random_text(rng, 25)
        start, end = index.longest_overlap(text)
        pieces = [text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1) if any(text[i:j] in d for d in documents)]
        assert end - start == max(map(len, pieces), default=0)
        assert end == start or any(text[start:end] in d for d in documents)


def test_a_copied_story_is_found_whole_and_never_across_two_documents():
    index = CorpusIndex(["小兔在公园里。", "天黑了。", "天黑了。"])
    assert index.longest_overlap("从前，小兔在公园里。天黑了。") == (3, 10)
    assert index.longest_overlap("") == (0, 0) and index.longest_overlap("xyz") == (0, 0)
    assert CorpusIndex([]).longest_overlap("好") == (0, 0)
