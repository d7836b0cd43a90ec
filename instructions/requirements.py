"""What an instruction may require of a story, and whether a story meets it: exact checks of the text, without a model.

| kind | a story meets it if | share |
|---|---|---|
| words | each word occurs | of the words that occur |
| feature | it has the feature | 0 or 1 |
| people | each name occurs | of the names that occur |
| place | the place occurs | 0 or 1 |
| summary | the people and things that the summary names occur | of those that occur |
| sentence | the sentence stands in the story word for word | of the sentence, its longest stretch in the story |
| length | its length is in the range | length / shortest, or longest / length |
| beginning | it begins with the text | of the text, the part with which the story begins |
"""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import takewhile
from typing import NamedTuple

from ..stories.facts import has_feature

FIELDS = {  # of each kind
    "words": ("words",),
    "feature": ("text",),
    "people": ("words",),
    "place": ("text",),
    "summary": ("text", "words"),
    "sentence": ("text",),
    "length": ("characters",),
    "beginning": ("text",),
}
DIALOGUE = "对话"  # judged in any text
FEATURES = (DIALOGUE, "转折", "冲突", "伏笔", "寓意", "坏结局")  # the others only in stories of the built-in kind


@dataclass(frozen=True)
class Requirement:
    """One requirement, with the fields that FIELDS lists for its kind.

    Raises ValueError for an unknown kind, and for a field that is empty or that the kind does not have."""

    kind: str
    text: str = ""  # the feature, place, sentence, summary or beginning
    words: tuple[str, ...] = ()  # the words, the names, or the people and things of the summary
    characters: tuple[int, ...] = ()  # shortest and longest, both allowed

    def __post_init__(self):
        if not isinstance(self.kind, str) or self.kind not in FIELDS:
            raise ValueError(f"kind is {self.kind!r}; choose one of {', '.join(FIELDS)}")
        for name in ("text", "words", "characters"):
            if bool(getattr(self, name)) != (name in FIELDS[self.kind]):
                has = " and ".join(FIELDS[self.kind])
                raise ValueError(f"a requirement of kind {self.kind!r} has {has}; {name} is {getattr(self, name)!r}")
        if not isinstance(self.text, str) or not all(isinstance(word, str) and word for word in self.words):
            raise ValueError(f"text and words must be strings that are not empty: {self.text!r}, {self.words!r}")
        if self.kind == "feature" and self.text not in FEATURES:
            raise ValueError(f"feature is {self.text!r}; choose one of {', '.join(FEATURES)}")
        if self.characters and not (
            len(self.characters) == 2 and all(type(n) is int for n in self.characters) and 0 < self.characters[0] <= self.characters[1]
        ):
            raise ValueError(f"characters is {self.characters}; give the shortest and the longest length, such as [200, 250]")

    @classmethod
    def from_json(cls, value: object) -> "Requirement":
        """The requirement of an object such as {"kind": "words", "words": ["公园", "小狗"]}. Raises ValueError."""
        if not isinstance(value, dict) or not set(value) <= {"kind", "text", "words", "characters"} or "kind" not in value:
            raise ValueError(f"a requirement is an object with kind and text, words or characters, not {str(value)[:80]}")
        lists = {name: value.get(name, []) for name in ("words", "characters")}
        for name, field in lists.items():
            if not isinstance(field, list):
                raise ValueError(f"{name} of a requirement must be a list, not {str(field)[:80]}")
        return cls(value["kind"], value.get("text", ""), tuple(lists["words"]), tuple(lists["characters"]))

    def to_json(self) -> dict:
        """The inverse of `from_json`."""
        values = {name: getattr(self, name) for name in FIELDS[self.kind]}
        return {"kind": self.kind} | {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class Verdict(NamedTuple):
    """Whether a requirement is met, and the share of it that is; None if the text does not tell."""

    is_met: bool | None
    share: float | None


def judge(requirement: Requirement, story: str, *, is_built_in: bool = False) -> Verdict:
    """Judge a story. `is_built_in`: it is one of the built-in stories, or of a model that was trained on them; only their features other
    than dialogue can be judged."""
    text, words = requirement.text, requirement.words
    if requirement.kind == "feature":
        if text != DIALOGUE and not is_built_in:
            return Verdict(None, None)
        share = float(has_dialogue(story) if text == DIALOGUE else has_feature(story, text))
    elif words:
        share = sum(occurs(word, story) for word in words) / len(words)
    elif requirement.kind == "place":
        share = float(occurs(text, story))
    elif requirement.kind == "sentence":
        share = SequenceMatcher(None, text, story, autojunk=False).find_longest_match().size / len(text)
    elif requirement.kind == "length":
        n, (shortest, longest) = len(story.strip()), requirement.characters
        share = n / shortest if n < shortest else longest / n if n > longest else 1.0
    else:
        share = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, story.lstrip(), strict=False))) / len(text)
    return Verdict(share == 1, share)


def parts(requirement: Requirement, story: str) -> list[tuple[int, int]]:
    """(begin, end) of the words, names, place, sentence or beginning of the requirement where they are first in the story."""
    names = requirement.words or ((requirement.text,) if requirement.kind in ("place", "sentence", "beginning") else ())
    return [(begin, begin + len(name)) for name in names if (begin := story.find(name)) >= 0]


def occurs(word: str, story: str) -> bool:
    """Whether the word occurs. A word in Latin letters must stand alone, in upper or lower case."""
    if word.isascii():
        return bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", story, re.IGNORECASE | re.ASCII))
    return word in story


_SPEECH = re.compile(
    "|".join(
        rf"{opening}[^{opening}{closing}\n]*[。！？，…—～~.!?,]{closing}|[：:,，]\s*{opening}[^{opening}{closing}\n]+{closing}"
        for opening, closing in ("“”", "「」", "『』", '""', "‘’")
    )
)


def has_dialogue(text: str) -> bool:
    """Whether someone speaks: a quotation that ends with a mark, or follows a colon or comma. A quoted name or title is none."""
    return bool(_SPEECH.search(text))
