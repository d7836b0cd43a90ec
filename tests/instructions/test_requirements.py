"""A verifier says met for a right story and for what a story was made from, and not met for a wrong one and for changed facts."""

import json
import random

import pytest

from tritale.instructions.derive import of_built_in
from tritale.instructions.requirements import FEATURES, FIELDS, Requirement, has_dialogue, judge
from tritale.stories.generator import story
from tritale.stories.words import CHARACTERS, PLACES

STORY = "从前，小兔和小狗住在公园里。\n小狗说：“我们去放风筝吧！”小兔笑了。"
ENGLISH = "Once upon a time, Tom and Anna lived near the park. “Let us fly a kite!” said Tom."


def words(*values: str) -> Requirement:
    return Requirement("words", words=values)


@pytest.mark.parametrize(
    ("requirement", "text", "is_met", "share"),
    [
        (words("公园", "风筝"), STORY, True, 1),
        (words("公园", "苹果"), STORY, False, 0.5),
        (words("公园"), "", False, 0),
        (words("kite", "Park"), ENGLISH, True, 1),
        (words("on"), ENGLISH, False, 0),  # in Once and upon
        (words("Anna"), "他叫Anna。", True, 1),  # a Chinese character beside it is no part of it
        (Requirement("people", words=("小兔", "小狗")), STORY, True, 1),
        (Requirement("people", words=("小兔", "小猫")), STORY, False, 0.5),
        (Requirement("place", "公园"), STORY, True, 1),
        (Requirement("place", "山洞"), STORY, False, 0),
        (Requirement("summary", "小兔和小猫去放风筝。", ("小兔", "小猫", "风筝")), STORY, False, 2 / 3),
        (Requirement("sentence", "小兔笑了。"), STORY, True, 1),
        (Requirement("sentence", "小兔哭了。"), STORY, False, 2 / 5),
        (Requirement("length", characters=(len(STORY), len(STORY) + 9)), STORY + "\n", True, 1),
        (Requirement("length", characters=(2 * len(STORY), 999)), STORY, False, 0.5),
        (Requirement("length", characters=(1, len(STORY) - 1)), STORY, False, (len(STORY) - 1) / len(STORY)),
        (Requirement("length", characters=(1, 9)), "", False, 0),
        (Requirement("beginning", "从前，"), "\n" + STORY, True, 1),
        (Requirement("beginning", "从前。"), STORY, False, 2 / 3),
        (Requirement("feature", "对话"), STORY, True, 1),
        (Requirement("feature", "对话"), "小狗住在“快乐”公园里。", False, 0),
        (Requirement("feature", "寓意"), STORY, None, None),
    ],
)
def test_right_and_wrong_stories(requirement, text, is_met, share):
    verdict = judge(requirement, text)
    assert verdict.is_met is is_met and verdict.share == pytest.approx(share)
    assert Requirement.from_json(json.loads(json.dumps(requirement.to_json()))) == requirement


@pytest.mark.parametrize(
    ("text", "speaks"),
    [
        ("「走吧。」他說。", True),
        ("他說：「快樂」", True),
        ("這叫做「快樂」。", False),
        ('"Go home," said Anna.', True),
        ('They call it "home" today.', False),
        ("“没有结束", False),
        ("他不说话。", False),
    ],
)
def test_a_quoted_name_is_no_dialogue(text, speaks):
    assert has_dialogue(text) is speaks


def changed(requirement: Requirement, rng: random.Random) -> Requirement:
    """The requirement with other facts."""
    if requirement.kind in ("words", "people", "summary"):
        replacement = rng.choice([c.name for c in CHARACTERS])
        i = rng.randrange(len(requirement.words))
        return Requirement(requirement.kind, requirement.text, (*requirement.words[:i], replacement, *requirement.words[i + 1 :]))
    if requirement.kind == "place":
        return Requirement("place", rng.choice([p.name for p in PLACES]))
    if requirement.kind == "length":
        return Requirement("length", characters=tuple(n + rng.choice((-50, 50)) for n in requirement.characters[:1]) * 2)
    text, i = requirement.text, rng.randrange(len(requirement.text))
    return Requirement(requirement.kind, f"{text[:i]}龘{text[i + 1 :]}")


def test_a_built_in_story_meets_its_own_facts_and_not_changed_ones(seed):
    rng, wrongly_met = random.Random(seed), dict.fromkeys(FIELDS, 0)
    for i in range(1000):
        s = story(seed, i)
        found = of_built_in(s, rng)
        assert found.keys() >= {"words", "feature", "people", "place", "summary", "length"}, s
        for kind, requirement in found.items():
            assert judge(requirement, s.text, is_built_in=True) == (True, 1), (requirement, s)
            if kind != "feature":
                wrongly_met[kind] += judge(changed(requirement, rng), s.text) == (True, 1)
        for feature in FEATURES:
            assert judge(Requirement("feature", feature), s.text, is_built_in=True).is_met == (feature in s.features)
    # The text may name the place or person that was drawn instead.
    assert wrongly_met.pop("place") < 70 and max(wrongly_met.pop(kind) for kind in ("people", "words", "summary")) < 50
    assert not any(wrongly_met.values()), wrongly_met


def test_a_story_without_the_word_or_with_a_changed_sentence_does_not_meet_it(seed):
    rng = random.Random(seed)
    for i in range(300):
        s = story(seed, i)
        for requirement in of_built_in(s, rng).values():
            for part in requirement.words or (requirement.text,):
                if part and requirement.kind != "feature":
                    verdict = judge(requirement, s.text.replace(part, "龘"))
                    assert verdict.is_met is False and verdict.share != 1, (requirement, part)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "colour", "text": "红"}, "kind is 'colour'; choose one of words"),
        ({"kind": "words", "words": []}, "has words; words is"),
        ({"kind": "words", "words": ["小狗", 3]}, "must be strings"),
        ({"kind": "words", "words": "小狗"}, "must be a list"),
        ({"kind": "place", "text": "公园", "words": ["小狗"]}, "has text; words is"),
        ({"kind": "feature", "text": "有趣"}, "choose one of 对话"),
        ({"kind": "length", "characters": [300, 200]}, "shortest and the longest"),
        ({"kind": "length", "characters": [1.5, 2]}, "shortest and the longest"),
        ({"kind": "length"}, "has characters"),
        ({"words": ["小狗"]}, "an object with kind"),
        ({"kind": "words", "words": ["小狗"], "colour": 1}, "an object with kind"),
        ({"kind": []}, "kind is"),
        (3, "an object with kind"),
    ],
)
def test_what_is_no_requirement_is_said(value, message):
    with pytest.raises(ValueError, match=message):
        Requirement.from_json(value)
