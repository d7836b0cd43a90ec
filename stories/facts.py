"""Which characters, things and features of the built-in stories a text has, and whether its cast is consistent."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from .generator import Choice, Mark, Slot, parse, story
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


# The sentence of a mark ends here: its first part says enough, and what follows may vary in a generated story.
_STOP = re.compile(r"[。！？：]")
_ANY_NAME = r"[^，。！？：“”\n]{1,8}"  # in place of a slot


def _sentence(parts: tuple) -> tuple[str, bool]:
    # A regular expression for the text of `parts` up to the first _STOP, and whether all of it ends there.
    pattern = ""
    for part in parts:
        if isinstance(part, str):
            if stop := _STOP.search(part):
                return pattern + re.escape(part[: stop.end()]), True
            pattern += re.escape(part)
        elif isinstance(part, Slot):
            pattern += _ANY_NAME
        elif isinstance(part, Choice):
            ended, open_ = [], []
            for option in part.options:
                text, is_complete = _sentence(option)
                (ended if is_complete else open_).append(text)
            if not open_:
                return f"{pattern}(?:{'|'.join(ended)})", True
            rest, is_complete = _sentence(parts[parts.index(part) + 1 :])
            choice = f"(?:{'|'.join(open_)}){rest}"
            return pattern + (f"(?:{'|'.join([*ended, choice])})" if ended else choice), is_complete
    return pattern, False


def _marked(parts: tuple) -> Iterator[tuple[str, str]]:
    # (feature, regular expression of the sentence behind its mark) of each mark in a template.
    for i, part in enumerate(parts):
        if isinstance(part, Mark):
            yield part.feature, _sentence(parts[i + 1 :])[0]
        elif isinstance(part, Choice):
            for option in part.options:
                yield from _marked(option)


@cache
def _feature_patterns() -> dict[str, re.Pattern]:
    found: dict[str, list[str]] = {}
    for plot in PLOTS:
        for feature, pattern in _marked(parse(plot.text)):
            found.setdefault(feature, []).append(pattern)
    return {feature: re.compile("|".join(patterns)) for feature, patterns in found.items()}


def has_feature(text: str, feature: str) -> bool:
    """Whether the text has a feature of the built-in stories: dialogue (对话), or a sentence that shows it in one of the plots
    (转折 坏结局 寓意 冲突 伏笔), whoever it is about. True of a built-in story if and only if the feature is one of its facts."""
    return bool(re.search("“[^“”]+”", text)) if feature == "对话" else bool(_feature_patterns()[feature].search(text))


RUN = 6  # characters of a run that no other plot has
CONTEXTS, OFTEN = (4, 3, 2, 1), 15  # characters before a character: the most that occur so often in a plot decide how likely it is
MARKS = "，。：？！”"  # which are enough by themselves
TELLING = 3  # times as likely in its plot as in all of them


@cache
def _runs() -> tuple[dict[str, str], Counter, dict[str, Counter]]:
    # Of 2,000 stories the plot of each run of RUN characters that is in at least 3 of them, all of one plot; and how often each run of 2 to
    # 5 characters occurs, in all stories and in those of each plot.
    found: dict[str, list[str]] = {}
    counts, of_plot = Counter(), {}
    for s in (story(0, i) for i in range(2000)):
        runs = lambda n, text=s.text: [text[i : i + n] for i in range(len(text) - n + 1)]
        for run in set(runs(RUN)):
            found.setdefault(run, []).append(s.plot)
        for n in range(CONTEXTS[-1], CONTEXTS[0] + 2):
            counts.update(runs(n))
            of_plot.setdefault(s.plot, Counter()).update(runs(n))
    return {run: plots[0] for run, plots in found.items() if len(plots) >= 3 and len(set(plots)) == 1}, counts, of_plot


def plot_shows(text: str) -> list[int]:
    """The first characters of a built-in story that tell which plot it has, as places in the text: those that are TELLING times as likely
    behind the characters before them if one knows the plot, up to the first run of RUN characters that no other plot has, and its end.

    Many plots share their first sentences. Empty if no plot is found."""
    plots, counts, of_plot = _runs()
    end, plot = next(((i + RUN, plots[text[i : i + RUN]]) for i in range(len(text)) if text[i : i + RUN] in plots), (0, ""))
    own, places = of_plot.get(plot, Counter()), []
    for i in range(1, end):
        before = next((text[i - n : i] for n in CONTEXTS if n <= i and own[text[i - n : i]] >= OFTEN), "")
        run = before + text[i]
        if (before in MARKS or len(before) > 1) and own[run] * counts[before] >= TELLING * counts[run] * own[before] > 0:
            places.append(i)
    return sorted({*places, *range(max(0, end - 4), end)})
