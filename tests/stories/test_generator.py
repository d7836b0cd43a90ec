"""The story generator: pure, exact about its own entropy, and consistent."""

import math
import re
from collections import Counter
from fractions import Fraction

import pytest

from tritale.stories import generator as S
from tritale.stories.generator import TRAIN_START, VALIDATION_START, Chooser, entropy_bits_per_char, parse, render, story, tell
from tritale.stories.words import CHARACTERS, PLACES, THINGS

N = 5000
FEATURES = {"对话", "转折", "坏结局", "寓意", "冲突", "伏笔"}
NAMES = sorted((c.name for c in CHARACTERS), key=len, reverse=True)
# Things that the text of a plot mentions besides its drawn thing.
PROPS = {
    "贪吃": {"皮球", "西瓜", "苹果", "盘子"},
    "生日": {"蛋糕"},
    "迷路": {"包子", "向日葵"},
    "失约": {"积木"},
}


@pytest.fixture(scope="module")
def stories():
    return [story(1, i) for i in range(N)]


class Enumerator(Chooser):
    """Takes given branches, records how many there were, and multiplies their exact probabilities."""

    def __init__(self, path):
        self.path, self.seen, self.bits, self.probability = path, [], 0.0, Fraction(1)

    def _next(self, n):
        i = self.path[len(self.seen)] if len(self.seen) < len(self.path) else 0
        self.seen.append((i, n))
        return i

    def below(self, n):
        self.bits += math.log2(n)
        self.probability /= n
        return self._next(n)

    def weighted(self, weights):
        i = self._next(len(weights))
        self.bits += math.log2(sum(weights) / weights[i])
        self.probability *= Fraction(weights[i], sum(weights))
        return i


def leaves(template):
    """Every walk through a template: (text, probability, bits)."""
    path = []
    while path is not None:
        chooser, out = Enumerator(path), []
        render(template, chooser, {"A": "汤姆"}, out, set())
        yield "".join(out), chooser.probability, chooser.bits
        path = [i for i, _ in chooser.seen]
        while path and path[-1] + 1 == chooser.seen[len(path) - 1][1]:
            path.pop()
        path = [*path[:-1], path[-1] + 1] if path else None


TABLES = {"mood": ("笑", "哭", "[跳|唱]"), "end": ((3, "了"), (1, "着[呢|]"))}


def test_probabilities_of_a_small_grammar_sum_to_one_and_bits_are_their_logarithm():
    found = list(leaves(parse("{A}[在[这里|那里]|]<mood><end>。", TABLES)))
    assert len(found) == len({text for text, _, _ in found}) == 3 * 4 * 3
    assert sum(p for _, p, _ in found) == 1
    for _, p, bits in found:
        assert bits == pytest.approx(-math.log2(p), abs=1e-9)


def test_drawn_frequencies_match_the_bits_of_the_chooser():
    template, counts, claimed, n = parse("[在[这里|那里]|]<mood><end>。", TABLES), Counter(), {}, 40000
    for i in range(n):
        chooser, out = Chooser(7, i), []
        render(template, chooser, {}, out, set())
        counts["".join(out)] += 1
        claimed["".join(out)] = chooser.bits
    assert len(counts) == 36
    assert sum(2.0**-b for b in claimed.values()) == pytest.approx(1)
    for text, k in counts.items():
        p = 2.0 ** -claimed[text]
        assert abs(k - n * p) < 5 * math.sqrt(n * p * (1 - p)), text


def test_famous_pair_takes_a_tenth_and_the_bits_of_every_cast_are_exact():
    plot = next(p for p in S.PLOTS if p.cast == "AB" and not p.things)
    pairs, n_places = {}, len(S._tagged("place", plot.place))
    n = len(S._HEROES)
    for a in range(n):
        for b in range(len(S._FRIENDS[S._HEROES[a]])):
            chooser = Enumerator([1, a, b])
            _, cast, _, _ = S._cast(plot, chooser)
            assert chooser.bits == pytest.approx(-math.log2(chooser.probability), abs=1e-9)
            pairs[cast[0].name, cast[1].name] = chooser.probability * n_places
    chooser = Enumerator([0])
    S._cast(plot, chooser)
    assert ("汤姆", "杰瑞") not in pairs  # one way only to draw the pair
    assert chooser.probability * n_places == Fraction(1, 10)
    assert sum(pairs.values()) + Fraction(1, 10) == 1
    assert all(a != b for a, b in pairs)


def test_chooser_counts_every_draw_of_a_story():
    class Counting(Chooser):
        price = 0.0

        def below(self, n):
            self.price += math.log2(n)
            return super().below(n)

        def weighted(self, weights):
            i = super().weighted(weights)
            self.price += math.log2(sum(weights) / weights[i])
            return i

    for i in range(200):
        chooser = Counting(3, i)
        assert tell(chooser).bits == pytest.approx(chooser.price, abs=1e-6)
        assert chooser.price > 50


def test_same_number_same_story_in_any_order(stories):
    for i in (4999, 0, 17, 2500):
        assert story(1, i) == stories[i]
    assert story(2, 17) != stories[17]
    assert story(1, 2**63).text != story(1, 0).text


def test_hash_is_pinned_so_that_stories_do_not_change():
    chooser = Chooser(42, VALIDATION_START + 5)
    assert [chooser.below(1000) for _ in range(6)] == [660, 706, 918, 850, 316, 684]


def test_draws_are_even():
    for n in (2, 3, 7, 60):
        counts = Counter(Chooser(0, i).below(n) for i in range(20000))
        chi2 = sum((counts[k] - 20000 / n) ** 2 / (20000 / n) for k in range(n))
        assert chi2 < n - 1 + 5 * math.sqrt(2 * (n - 1)) + 5, n


def test_no_story_occurs_twice_and_validation_is_new():
    texts = [story(0, TRAIN_START + i).text for i in range(20000)] + [story(0, VALIDATION_START + i).text for i in range(2000)]
    assert len(set(texts)) == 22000


def test_there_is_enough_variety(stories):
    assert len(S.PLOTS) >= 16
    assert len(CHARACTERS) == len({c.name for c in CHARACTERS}) >= 60
    assert {"汤姆", "杰瑞"} <= {c.name for c in CHARACTERS}
    assert len(THINGS) == len({t.name for t in THINGS}) >= 60
    assert len(PLACES) == len({p.name for p in PLACES}) >= 30
    assert {s.plot for s in stories} == {p.name for p in S.PLOTS}
    # 2^H lies below the number of stories; H = the mean of the bits.
    assert sum(s.bits for s in stories) / N > math.log2(1e9)
    assert entropy_bits_per_char(stories) == pytest.approx(sum(s.bits for s in stories) / sum(len(s.text) for s in stories))


def test_lengths(stories):
    assert all(100 <= len(s.text) <= 350 for s in stories)


def test_prompt_opening_and_famous_pair_are_common(stories):
    opening = sum(re.match(r"(\w+)和(\w+)是好朋友，", s.text) is not None for s in stories) / N
    assert 0.12 < opening < 0.25
    famous = sum(s.characters[:2] == ("汤姆", "杰瑞") and f"{s.characters[0]}和{s.characters[1]}" in s.text for s in stories)
    assert famous / N > 0.04


def test_nobody_and_nothing_appears_from_nowhere(stories):
    name = re.compile("|".join(NAMES))
    thing = re.compile("|".join(sorted((t.name for t in THINGS), key=len, reverse=True)))
    measure = {t.name: t.measure for t in THINGS}
    for s in stories:
        assert set(name.findall(s.text)) == set(s.characters), s
        assert set(name.findall(s.summary)) <= set(s.characters), s
        assert s.characters[0] in s.summary, s
        own = set(thing.findall(s.summary)) - {s.place}
        assert set(thing.findall(s.text.replace(s.place, ""))) - own <= PROPS.get(s.plot, set()), s
        assert own <= set(thing.findall(s.text)), s
        assert s.place in s.text, s
        for t in own & set(s.words):
            for m in re.findall(f"一(.){t}", s.text):
                assert m in (measure[t], "口"), (m, s)  # 咬了一口桃子


def test_pronouns_fit_the_characters(stories):
    pronoun = {c.name: c.pronoun for c in CHARACTERS}
    for s in stories:
        allowed = {pronoun[n] for n in s.characters}
        if "他们" in s.text:
            assert len({pronoun[n] for n in s.characters[:2]}) == 2 or pronoun[s.characters[0]] == "他", s
        if "她们" in s.text:
            assert {pronoun[n] for n in s.characters[:2]} == {"她"}, s
        # 它 may also be a thing; 他 and 她 are people of the story only
        assert set(re.findall("[他她](?!们)", s.text.replace("其他", ""))) <= allowed, s


def test_words_and_features_are_true(stories):
    for s in stories:
        assert 2 <= len(s.words) <= 5 and len(set(s.words)) == len(s.words), s
        assert all(w in s.text for w in s.words), s
        assert set(s.features) <= FEATURES
        assert ("对话" in s.features) == ("“" in s.text), s
    assert {f for s in stories for f in s.features} == FEATURES


def test_text_is_clean(stories):
    for s in stories:
        for text in (s.text, s.summary):
            assert not re.search(r"[\[\]{}<>|¶#a-zA-Z0-9 ]", text), text
            assert not re.search(r"[，。！？：；、]{2}|^[，。！？”]|[，。！？：]\n?”?[，。]|\n\n|“”|[：，]$|的的|了了|，”", text), text
            assert not re.search(r"([一-鿿]{3,})\1", text), text
            assert not re.search(r"([一-鿿]{4,})，\1", text), text
        depth = 0
        for ch in s.text:
            depth += (ch == "“") - (ch == "”")
            assert depth in (0, 1, 2) and (depth == 0 or ch != "\n"), s
        assert depth == 0 and s.text[-1] in "。！？”" and "\n" not in (s.text[0], s.text[-1]), s
        assert s.summary.endswith("。") and s.summary.count("。") == 1


@pytest.mark.parametrize("template", ["[a|b", "a|b", "a]b"])
def test_unbalanced_template_is_refused(template):
    with pytest.raises(ValueError, match="template"):
        parse(template)


def test_unknown_table_is_refused():
    with pytest.raises(KeyError, match="nowhere"):
        parse("<nowhere>")
