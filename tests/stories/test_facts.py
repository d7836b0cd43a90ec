"""The characters, things and features found in built-in stories and in stories with a planted fault."""

import random
import re

import pytest

from tritale.evaluation.measures import ends_properly
from tritale.stories.facts import RUN, cast, has_feature, plot_shows
from tritale.stories.generator import story

FEATURES = ("对话", "转折", "冲突", "伏笔", "寓意", "坏结局")


def test_every_built_in_story_is_consistent_and_ends_properly(seed):
    for i in range(300):
        s = story(seed, i)
        found = cast(s.text)
        assert found.is_consistent, (found, s.text)
        assert set(found.heroes + found.adults) <= set(s.characters)
        assert ends_properly(s.text)


@pytest.mark.parametrize(
    ("text", "is_consistent"),
    [
        ("", False),
        ("的的的。", False),
        ("喜欢挖土。", False),  # about nobody
        ("从前，豆豆爱画画。", True),
        ("从前，豆豆爱画画。豆豆去公园。冬冬哭了。", False),  # the second hero comes from nowhere
        ("从前，豆豆爱画画。豆豆去公园，看见冬冬坐在石头上。", True),
        ("从前，豆豆爱画画。豆豆迷路了！\n就在这时，冬冬抱着皮球路过。", True),
        ("豆豆有一个最要好的朋友，名字叫冬冬。", True),
        ("小狐狸和小狗是好朋友。小狗笑了。小狐狸也笑了。", True),
    ],
)
def test_a_story_has_a_hero_and_introduces_the_second(text, is_consistent):
    assert cast(text).is_consistent is is_consistent


def test_a_second_hero_without_introduction_is_noticed_in_any_built_in_story(seed):
    for i in range(100):
        text = story(seed, i).text
        first, *more = cast(text).heroes
        if not more:
            other = "冬冬" if first != "冬冬" else "豆豆"
            assert cast(f"{text}{other}笑了。").strangers == (other,)


def test_a_person_or_a_thing_from_nowhere_is_noticed(seed):
    rng, noticed = random.Random(seed), 0
    for i in range(100):
        s = story(seed, i)
        adults = [name for name in ("爷爷", "孙大叔", "山羊婆婆") if name not in s.characters]
        assert not cast(s.text + f"突然，汤姆、妞妞和{'小狐狸'}来了。").is_consistent
        changed = s.text + "".join(f"{name}来了。" for name in adults)
        assert not cast(changed).is_consistent
        noticed += not cast(s.text + f"他拿出{rng.choice(['口琴', '望远镜'])}和贝壳。").is_consistent
    assert noticed == 100


def test_a_feature_is_found_in_a_text_exactly_if_the_story_has_it(seed):
    for i in range(1000):
        s = story(seed, i)
        assert {f for f in FEATURES if has_feature(s.text, f)} == set(s.features), s


@pytest.mark.parametrize("feature", FEATURES)
def test_a_story_without_the_sentence_that_shows_a_feature_does_not_have_it(feature, seed):
    shown = [s for s in (story(seed, i) for i in range(200)) if feature in s.features]
    assert shown
    for s in shown:
        sentences = [part for part in re.split(r"(?<=[。！？：”\n])", s.text) if part]
        without = "".join(part for part in sentences if not has_feature(part, feature) and "“" not in part)
        assert not has_feature(without, feature)


def test_the_first_characters_that_tell_the_plot_are_in_no_story_of_another_one(seed):
    stories = [story(seed, i) for i in range(400)]
    n_wrong = n_late = n_earlier = 0
    for s in stories[:100]:
        *earlier, _, _, _, last = plot_shows(s.text)
        run = s.text[last + 1 - RUN : last + 1]
        n_wrong += any(run in other.text for other in stories if other.plot != s.plot)
        n_late += last > len(s.text) / 2
        n_earlier += bool(earlier)
    assert n_wrong < 5 and n_late < 10 and n_earlier > 50
    assert plot_shows("这里没有故事。") == []


def test_the_characters_that_show_the_plot_are_those_that_it_makes_likely(seed):
    """Of the characters behind "。" or "，" that show the plot, the share is larger in stories of that plot than in all stories."""
    stories = [story(seed, i) for i in range(1200)]
    higher = total = 0
    for s in stories[:150]:
        for i in plot_shows(s.text)[:-4]:
            if s.text[i - 1] in "。，":
                run, before = s.text[i - 1 : i + 1], s.text[i - 1]
                share = lambda of, run=run, before=before: sum(o.text.count(run) for o in of) / sum(o.text.count(before) for o in of)
                higher += share([o for o in stories if o.plot == s.plot]) > 1.5 * share(stories)
                total += 1
    assert total > 30 and higher > 0.8 * total
