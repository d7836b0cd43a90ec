"""A generator of short Chinese children's stories, without any download.

`story(seed, index)` is a pure function. A plot (see `plots.py`) is a template with slots and alternatives. A story is one walk through
the template. Each choice on the walk is drawn from a counter-based hash of (seed, index, number of the draw) and adds −log2 of its
probability to `Story.bits`. So the entropy of the stories is known, and it is a lower bound of a model's validation loss: no model can be
better than `entropy_bits_per_char` on average. (Two walks rarely give the same text, so the bound is tight.)

Template notation, parsed once at import:

    {A}  {T.一}        a slot: the hero's name; the thing with its measure word (一只风筝)
    [x|y|z]            one of several, with equal probability; they may be nested, and one may be empty
    <oneday>           a table that the plots share
    <#坏结局>           no text; the story has this feature
    ¶                  a new paragraph; all other white space is removed
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from .plots import PLOTS, TABLES, Plot
from .words import CHARACTERS, FEELINGS, PLACES, THINGS, Character, Place, Thing

TRAIN_START, VALIDATION_START = 0, 1 << 40  # separate ranges of the index

_M64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Story:
    """A story and the facts from which it was made."""

    text: str  # 100 to 350 characters, paragraphs separated by "\n"
    characters: tuple[str, ...]
    place: str
    words: tuple[str, ...]  # 2 to 5 important words of the text
    features: tuple[str, ...]  # 对话 转折 坏结局 寓意 冲突 伏笔, each true of the story
    summary: str  # one sentence
    plot: str
    bits: float  # −log2 of the probability of the choices that made the story


# -- choices -----------------------------------------------------------------------------------------------------------


def _mix64(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): a bijection of 64-bit integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _M64
    return x ^ (x >> 31)


_LOG2 = (0.0, *(math.log2(n) for n in range(1, 256)))


class Chooser:
    """The random draws for one story, and their information in bits. Draw k is the k-th output of splitmix64, started at a hash
    of (seed, index). Multiply-shift maps it to 0..n−1 with a bias below n / 2^64."""

    def __init__(self, seed: int, index: int):
        self.state = _mix64(_mix64((seed + _GOLDEN) & _M64) ^ _mix64(index & _M64))
        self.bits = 0.0

    def below(self, n: int) -> int:
        """A uniform integer in 0..n−1."""
        self.state = (self.state + _GOLDEN) & _M64
        self.bits += _LOG2[n] if n < 256 else math.log2(n)
        return (_mix64(self.state) * n) >> 64

    def weighted(self, weights: Sequence[int]) -> int:
        """An index, drawn with probability weight / sum(weights)."""
        total = sum(weights)
        self.state = (self.state + _GOLDEN) & _M64
        point = (_mix64(self.state) * total) >> 64
        i = 0
        while point >= weights[i]:
            point -= weights[i]
            i += 1
        self.bits += math.log2(total / weights[i])
        return i

    def pick(self, options: Sequence):
        """One of the options, with equal probability."""
        return options[self.below(len(options))]


# -- templates ---------------------------------------------------------------------------------------------------------
# A parsed template is a tuple of parts: str (text), Slot, Mark, or Choice of further templates.


@dataclass(frozen=True)
class Slot:
    name: str


@dataclass(frozen=True)
class Mark:
    feature: str


@dataclass(frozen=True)
class Choice:
    options: tuple  # of parsed templates
    weights: tuple[int, ...] | None = None


_TOKEN = re.compile(r"\{([^{}]*)\}|<([^<>]*)>|([\[|\]])|([^\[\]{}<>|]+)")


def parse(template: str, tables: dict | None = None) -> tuple:
    """Parse a template into nested parts. Raises ValueError for unbalanced brackets, KeyError for an unknown table."""
    source = re.sub(r"\s+", "", template).replace("¶", "\n")
    tables = TABLES if tables is None else tables
    stack: list[list[list]] = [[[]]]  # open choices → their options so far → the parts of each
    end = 0
    for m in _TOKEN.finditer(source):
        if m.start() != end:
            raise ValueError(f"cannot read template at {source[end : end + 20]!r}")
        end = m.end()
        slot, table, bracket, text = m.groups()
        parts = stack[-1][-1]
        if slot is not None:
            parts.append(Slot(slot))
        elif table is not None:
            if table.startswith("#"):
                parts.append(Mark(table[1:]))
            else:
                parts.append(_parse_table(table) if tables is TABLES else _table(tables[table], tables))
        elif text is not None:
            parts.append(text)
        elif bracket == "[":
            stack.append([[]])
        elif len(stack) == 1:
            raise ValueError(f"{bracket!r} outside of [ ] in template {source[max(0, end - 20) : end + 5]!r}")
        elif bracket == "|":
            stack[-1].append([])
        else:
            options = tuple(map(tuple, stack.pop()))
            stack[-1][-1].append(Choice(options))
    if len(stack) != 1 or end != len(source):
        raise ValueError(f"unclosed bracket in template {source[:40]!r}…")
    return tuple(stack[0][0])


def _table(rows: Sequence, tables: dict) -> Choice:
    if isinstance(rows[0], str):
        return Choice(tuple(parse(row, tables) for row in rows))
    weights, rows = zip(*rows, strict=True)
    return Choice(tuple(parse(row, tables) for row in rows), weights)


@cache
def _parse_table(name: str) -> Choice:
    if name not in TABLES:
        raise KeyError(f"no table <{name}>; there are {', '.join(TABLES)}")
    return _table(TABLES[name], TABLES)


def render(template: tuple, chooser: Chooser, slots: dict[str, str], out: list[str], features: set[str]) -> None:
    """Walk through a parsed template and draw each choice. Appends the text to `out` and adds to `features`."""
    for part in template:
        kind = type(part)
        if kind is str:
            out.append(part)
        elif kind is Slot:
            out.append(slots[part.name])
        elif kind is Choice:
            options = part.options
            i = chooser.below(len(options)) if part.weights is None else chooser.weighted(part.weights)
            render(options[i], chooser, slots, out, features)
        else:
            features.add(part.feature)


# -- casting -----------------------------------------------------------------------------------------------------------

_HEROES = tuple(c for c in CHARACTERS if c.kind in ("child", "animal"))
_TOM, _JERRY = (next(c for c in _HEROES if c.name == name) for name in ("汤姆", "杰瑞"))
# The pair of the README's prompt (汤姆和杰瑞是好朋友，) has a tenth of all stories with two friends. The other draw excludes it, so
# that it can be drawn in one way only and its information in bits is exact.
_FAMOUS, _OTHERS = 1, 9
_FRIENDS = {
    a: tuple(b for b in _HEROES if b is not a and (a, b) != (_TOM, _JERRY)) for a in _HEROES
}  # fmt: skip


def _adults(kind: str) -> tuple[Character, ...]:
    return tuple(c for c in CHARACTERS if c.kind == kind)


_FAMILY, _NEIGHBOURS = _adults("family"), _adults("neighbour")


@cache
def _tagged(kind: str, tag: str) -> tuple:
    """The things or places with this tag, or with all of several (`out play`)."""
    words = tuple(w for w in (THINGS if kind == "thing" else PLACES) if w.tags.issuperset(tag.split()))
    if not words:
        raise ValueError(f"no {kind} is tagged {tag!r}")
    return words


def _they(a: Character, b: Character) -> str:
    return a.pronoun + "们" if a.pronoun == b.pronoun else "他们"


def _cast(plot: Plot, chooser: Chooser) -> tuple[dict[str, str], list[Character], Place, list[Thing]]:
    """Draw the characters, things and place of a plot: the slots of its template, and what they were made from."""
    cast: dict[str, Character] = {}
    if "B" in plot.cast:
        if chooser.weighted((_FAMOUS, _OTHERS)) == 0:
            cast["A"], cast["B"] = _TOM, _JERRY
        else:
            cast["A"] = chooser.pick(_HEROES)
            cast["B"] = chooser.pick(_FRIENDS[cast["A"]])
    else:
        cast["A"] = chooser.pick(_HEROES)
    if "C" in plot.cast:
        cast["C"] = chooser.pick([c for c in _HEROES if c not in cast.values()])
    if "P" in plot.cast:
        cast["P"] = chooser.pick(_FAMILY)
    if "N" in plot.cast:
        cast["N"] = chooser.pick(_NEIGHBOURS)
    slots = {}
    for role, c in cast.items():
        slots[role] = c.name
        slots[role + ".他"] = c.pronoun
    if "B" in cast:
        slots["他们"] = _they(cast["A"], cast["B"])
    things: list[Thing] = []
    for role, tag in plot.things:
        thing = chooser.pick([t for t in _tagged("thing", tag) if t not in things] if things else _tagged("thing", tag))
        things.append(thing)
        slots[role] = thing.name
        slots[role + ".一"] = "一" + thing.measure + thing.name
        slots[role + ".量"] = thing.measure
    place = chooser.pick(_tagged("place", plot.place))
    slots["place"], slots["at"] = place.name, place.at
    return slots, list(cast.values()), place, things


# -- stories -----------------------------------------------------------------------------------------------------------

_PARSED = tuple((plot, parse(plot.text), parse(plot.summary)) for plot in PLOTS)
_FEELING = re.compile("|".join(FEELINGS))
_ORDER = ("对话", "转折", "冲突", "伏笔", "寓意", "坏结局")


def story(seed: int, index: int) -> Story:
    """Story number `index` (below 2**63), the same on every machine. Training stories count from `TRAIN_START`, validation stories from
    `VALIDATION_START`."""
    return tell(Chooser(seed, index))


def tell(chooser: Chooser) -> Story:
    """The story of the chooser's draws."""
    plot, template, summary = chooser.pick(_PARSED)
    slots, characters, place, things = _cast(plot, chooser)
    features: set[str] = set()
    out: list[str] = []
    render(template, chooser, slots, out, features)
    text = "".join(out)
    if "“" in text:
        features.add("对话")
    words = [t.name for t in things] + [place.name] + [w for w in plot.words if w in text] + _FEELING.findall(text)
    line: list[str] = []
    render(summary, chooser, slots, line, set())  # has no choices: adds no bits
    return Story(
        text=text,
        characters=tuple(c.name for c in characters),
        place=place.name,
        words=tuple(dict.fromkeys(words))[:5],
        features=tuple(f for f in _ORDER if f in features),
        summary="".join(line),
        plot=plot.name,
        bits=chooser.bits,
    )


def entropy_bits_per_char(stories: Iterable[Story]) -> float:
    """The entropy of the stories in bits per character: a lower bound of the mean loss of any model.

    It is the entropy of the walks. That of the texts is lower only if two walks give the same text."""
    bits = chars = 0
    for s in stories:
        bits += s.bits
        chars += len(s.text)
    return bits / chars
