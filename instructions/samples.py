"""Instruction samples: made from stories, written and read as JSON lines.

A line of a file is

    {"messages": [{"role": "user", "content": "写一个故事，…"}, {"role": "assistant", "content": "从前，…"}],
     "requirements": [{"kind": "words", "words": ["公园", "小狗"]}], "is_built_in": true}

Training reads the messages; `emphasis`, [[begin, end], …], the characters of the story that weigh more in the loss; and `borders`, [i, …],
the characters before which a token ends. All but the messages may be missing.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from random import Random

from ..common.errors import UserError
from ..common.files import atomic_file, read_json_object
from ..data.built_in import RECIPE, open_data
from ..data.chat import encode_chats, mark, problem
from ..data.shards import REMEDY, Split
from ..data.tokenizer import Tokenizer
from ..stories.facts import plot_shows
from ..stories.generator import TRAIN_START, VALIDATION_START, Story, story
from .derive import Found, Vocabulary, of_built_in, of_text
from .requirements import FIELDS, Requirement, Verdict, judge, parts
from .wording import instruction, language_of

MOST = 3  # requirements of an instruction
TELL_THE_PLOT, ALONE = {"words", "feature", "sentence", "beginning"}, 0.5
TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"
AT_ONCE = 512  # samples whose tokens are counted in one call
KEPT = 100_000  # built-in stories that stay in memory with their facts, about 0.3 GB

Track = Callable[[Iterable, str], Iterable]


@dataclass(frozen=True)
class Sample:
    """A conversation that ends with the story, and what the instruction requires of it."""

    messages: tuple[dict[str, str], ...]
    requirements: tuple[Requirement, ...] = ()
    is_built_in: bool = False  # the story is a built-in one, so all features of a story can be judged

    @property
    def story(self) -> str:
        return self.messages[-1]["content"]

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        """The messages before the story."""
        return self.messages[:-1]

    @property
    def emphasis(self) -> list[tuple[int, int]]:
        """(begin, end) of the characters of the story that decide whether it does what was asked: what an instruction names where it is
        first in the story, and, of a built-in story, its first character and those that first tell which plot it has."""
        found = [span for r in self.requirements for span in parts(r, self.story)]
        plot = plot_shows(self.story) if self.is_built_in else []
        return found + [(i, i + 1) for i in (0, *plot) if plot]

    @property
    def borders(self) -> list[int]:
        """The places in the story where a token ends: both ends of a required word, so that its tokens are those in the instruction."""
        return sorted({i for r in self.requirements if r.kind == "words" for span in parts(r, self.story) for i in span})

    def judge(self, story: str) -> list[Verdict]:
        """The verdict about each requirement for a story that a model wrote."""
        return [judge(r, story, is_built_in=self.is_built_in) for r in self.requirements]

    def to_json(self) -> dict:
        value: dict = {"messages": list(self.messages), "requirements": [r.to_json() for r in self.requirements]}
        value |= {"emphasis": [list(span) for span in self.emphasis], "borders": self.borders}
        return value | ({"is_built_in": True} if self.is_built_in else {})

    @classmethod
    def from_json(cls, value: object) -> "Sample":
        """Raises ValueError, which says what is wrong, for an object that is not such a sample."""
        if not isinstance(value, dict):
            raise ValueError("it is not an object with messages")
        messages, requirements = value.get("messages") or [], value.get("requirements", [])
        if what := problem(messages):
            raise ValueError(what)
        if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            raise ValueError("the last message is not an answer of the assistant with some text, behind an instruction")
        if not isinstance(requirements, list):
            raise ValueError("requirements is not a list")
        kept = tuple({"role": m["role"], "content": m["content"]} for m in messages)
        return cls(kept, tuple(map(Requirement.from_json, requirements)), value.get("is_built_in") is True)


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file. Raises FileNotFoundError, or UserError with the line of a sample that is wrong."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; make one with tritale instruct")
    samples, line = [], 0
    with open(path, encoding="utf-8") as file:
        try:
            for text in file:
                line += 1
                if text.strip():
                    samples.append(Sample.from_json(json.loads(text)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{max(1, line)}: {error}") from None
    if not samples:
        raise UserError(f"{path} has no samples; make some with tritale instruct")
    return samples


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write one sample a line. After an error an earlier file is unchanged."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample.to_json(), ensure_ascii=False) + "\n" for sample in samples)


@dataclass(frozen=True)
class Stories:
    """Stories of one split, and how to find the requirements that each meets."""

    n: int
    get: Callable[[int], tuple[str, Callable[[Random], Found]]]  # number of a story → its text and requirements
    is_built_in: bool


def open_stories(folder: Path, *, track: Track = lambda items, description: items) -> tuple[Stories, Stories]:
    """The training and the held-out stories of a data folder, of the built-in stories or made by `tritale prepare`. No text is in both.

    Built-in stories are told again from the folder's recipe, since their facts are not on disk, and held-out ones are as many as needed.
    Raises FileNotFoundError or UserError if the folder is incomplete or damaged."""
    if not (folder / "train").is_dir():
        raise FileNotFoundError(f"{folder} is not a data folder; give that of a run (out/quickstart/data) or the --out of tritale prepare")
    if (folder / RECIPE).is_file():
        recipe = read_json_object(folder / RECIPE, remedy=REMEDY)
        seed, n = recipe["seed"], recipe["stories"]
        told, known = [], set()
        for i in track(range(n), "telling the training stories"):
            s = story(seed, TRAIN_START + i)
            known.add(s.text)
            if i < KEPT:
                told.append(s)
        held_out = (s for i in count() if (s := story(seed, VALIDATION_START + i)).text not in known)
        cache: list[Story] = []

        def get_held_out(i: int) -> tuple[str, Callable[[Random], Found]]:
            cache.extend(islice(held_out, i + 1 - len(cache)))
            return cache[i].text, lambda rng: of_built_in(cache[i], rng)

        def get_train(i: int) -> tuple[str, Callable[[Random], Found]]:
            s = told[i] if i < KEPT else story(seed, TRAIN_START + i)
            return s.text, lambda rng: of_built_in(s, rng)

        return Stories(n, get_train, True), Stories(1 << 30, get_held_out, True)
    tokenizer, *splits = open_data(folder, verify=False)
    decode = lambda split, i: tokenizer.decode(split.document(i).tolist()).strip()
    order = Random(0).sample(range(splits[0].n_documents), min(splits[0].n_documents, 20_000))
    vocabulary = Vocabulary(decode(splits[0], i) for i in track(order, "finding words"))

    def stories_of(split: Split) -> Stories:
        def get(i: int) -> tuple[str, Callable[[Random], Found]]:
            text = decode(split, i)
            return text, lambda rng: of_text(text, rng, vocabulary)

        return Stories(split.n_documents, get, False)

    return stories_of(splits[0]), stories_of(splits[1])


def make_samples(
    stories: Stories, n: int, *, seed: int, tokenizer: Tokenizer | None = None, context: int | None = None, in_order: bool = False
) -> Iterator[Sample]:
    """`n` samples of 1 to MOST requirements of different kinds: the kinds, their order and the phrasing are drawn at random. The stories
    are taken in a random order, and again with other requirements if there are fewer than `n`. The same arguments give the same samples.

    With a `tokenizer` and `context`, only those that fit into the context. `in_order`: requirements in the order of FIELDS instead.
    Raises UserError if nearly no story gives a sample."""
    candidates = _candidates(stories, seed, in_order)
    made = tried = 0
    while made < n:
        batch = list(islice(candidates, min(AT_ONCE, n - made + 16)))
        tried += len(batch)
        samples = [sample for sample in batch if sample]
        if tokenizer and context:
            samples = fitting(samples, tokenizer, context)
        yield from samples[: n - made]
        made += len(samples)
        if tried > 2000 and made < tried / 50:
            raise UserError(
                f"only {made} of {tried} stories gave a sample: the others are longer than the context of {context} tokens with their "
                "instruction, or empty; give shorter stories, or a model with a longer context"
            )


def fitting(samples: list[Sample], tokenizer: Tokenizer, context: int) -> list[Sample]:
    """The samples with at most `context` tokens."""
    marked = [(*s.prompt, {**s.messages[-1], "content": mark(s.story, borders=s.borders)}) for s in samples]
    return [sample for sample, (ids, _) in zip(samples, encode_chats(tokenizer, marked), strict=True) if len(ids) <= context]


def _candidates(stories: Stories, seed: int, in_order: bool) -> Iterator[Sample | None]:
    for turn in count():
        order = range(stories.n) if stories.n >= 1 << 30 else Random(f"{seed} {turn}").sample(range(stories.n), stories.n)
        for i in order:
            rng = Random(f"{seed} {turn} {i}")
            text, found_by = stories.get(i)
            found = found_by(rng)
            kinds = rng.sample(list(found), len(found))
            if "summary" in kinds[: (n := rng.randint(1, MOST))]:  # it names the people and the place
                kinds = [kind for kind in kinds if kind not in ("people", "place")]
            chosen = [found[kind] for kind in (FIELDS if in_order else kinds) if kind in kinds[:n]]
            if not text or not chosen:
                yield None
                continue
            request = instruction(tuple(chosen), language_of(text), rng)
            messages = ({"role": "user", "content": request}, {"role": "assistant", "content": text})
            yield Sample(messages, tuple(chosen), stories.is_built_in)


def make_summaries(stories: Stories, n: int, *, seed: int) -> Iterator[Sample]:
    """`n` samples that ask for the summary of a story instead of the story, with one or two of the requirements that TELL_THE_PLOT, a share
    ALONE with nothing but a sentence; none if the stories have no summaries. The same arguments give the same samples.

    What an instruction says about the plot is in a few tokens of a long story, but in most of a summary."""
    for i in range(n):
        rng = Random(f"{seed} summary {i}")
        text, found_by = stories.get(i % stories.n)
        found = found_by(rng)
        if "summary" not in found:
            return
        kinds = [kind for kind in found if kind in TELL_THE_PLOT]
        is_alone = rng.random() < ALONE and "sentence" in found
        chosen = ["sentence"] if is_alone else rng.sample(kinds, min(len(kinds), rng.randint(1, 2)))
        if not chosen:
            continue
        request = instruction(tuple(found[kind] for kind in chosen), language_of(text), rng, asks_for_summary=True)
        summary = found["summary"].text
        messages = ({"role": "user", "content": request}, {"role": "assistant", "content": summary})
        yield Sample(messages, (Requirement("sentence", summary),))  # all of it is emphasised
