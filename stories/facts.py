"""Which characters and things of the built-in stories occur in a text, and whether they are consistent."""

import re
from dataclasses import dataclass
from functools import cache

from .plots import PLOTS, TABLES
from .words import CHARACTERS, THINGS


@dataclass(frozen=True)
class Cast:
    """The characters and things of the built-in stories that a text names."""

    heroes: tuple[str, ...]  # children and animals
    adults: tuple[str, ...]
    things: tuple[str, ...]
    strangers: tuple[str, ...]  # heroes after the first that the text does not introduce

    @property
    def is_consistent(self) -> bool:
        """True if the text names one or two heroes, introduces the second, and names at most one adult and one thing.

        Every built-in story does. A generated story that does not is about nobody, or a character or thing appears or changes in it
        without explanation."""
        return 1 <= len(self.heroes) <= 2 and not self.strangers and len(self.adults) <= 1 and len(self.things) <= 1


@cache
def _cast_words() -> tuple[tuple[str, ...], ...]:
    # Heroes, adults and things, longest words first. Things in the text of a plot ("a plate of …") are left out: any story may name them.
    plots = "".join(plot.text for plot in PLOTS) + str(TABLES)
    longest_first = lambda words: tuple(sorted(words, key=len, reverse=True))
    heroes = [c.name for c in CHARACTERS if c.kind in ("child", "animal")]
    adults = [c.name for c in CHARACTERS if c.kind not in ("child", "animal")]
    return longest_first(heroes), longest_first(adults), longest_first(t.name for t in THINGS if t.name not in plots)


# What precedes the name of a hero whom another one meets (plots 相遇 and 迷路) or who is introduced as a friend.
_INTRODUCTION = re.compile(r"(看见|发现|遇见|遇到|碰见|碰到|认识了?|(这时|正巧)，|朋友|伙伴|叫作?|就是)[：，]?$")


def cast(text: str) -> Cast:
    """Find the characters and things of the built-in stories in `text`. A word inside a longer one is not counted.

    A hero is introduced if the first sentence that names the first hero names it too, or if words such as 遇见 or 朋友 precede its name."""
    found: list[tuple[str, ...]] = []
    places: dict[str, int] = {}
    for words in _cast_words():
        left, names = text, []
        for word in words:
            if word in left:
                names.append(word)
                places[word] = left.find(word)
                left = left.replace(word, "\n" * len(word))
        found.append(tuple(names))
    heroes, adults, things = found
    first, *others = sorted(heroes, key=places.__getitem__) or [""]
    strangers = tuple(
        name for name in others
        if re.search(r"[。！？\n]", text[places[first] : places[name]]) and not _INTRODUCTION.search(text[: places[name]])
    )  # fmt: skip
    return Cast(heroes, adults, things, strangers)
