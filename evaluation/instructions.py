"""How often models write the story that an instruction asks for: each kind of requirement, and one, two or three of them together.

All models answer the same held-out instructions with the same seeds.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ..common.errors import UserError
from ..common.run_folder import find_checkpoint
from ..common.sampling import Sampling
from ..data.built_in import open_data
from ..inference.llm import LLM
from ..instructions.requirements import FEATURES, FIELDS, Verdict
from ..instructions.samples import Sample
from ..model.checkpoint import read_json
from .measures import wilson_interval
from .story_measures import StoryMeasures, decode, distinct_n, part_of_text
from .sweep import loss_of_texts
from .trained_run import read_config
from .validation import part

FORMAT, VERSION = "tritale-evaluation", 1


class Evaluation:
    """Measures models on the same instructions. `data` is a data folder: its held-out stories give the bits per character and the reference
    for the measures of stories, and its training stories are searched for copies.

    Raises UserError if there is no requirement to judge, or a setting is out of range."""

    def __init__(self, samples: Sequence[Sample], data: Path, *, sampling: Sampling, seed: int = 0, validation_documents: int = 200):
        if validation_documents < 1:
            raise UserError(f"--validation-documents is {validation_documents}; it must be at least 1")
        if not any(sample.requirements for sample in samples):
            raise UserError("no instruction has requirements, so there is nothing to judge; make some with tritale instruct")
        self.samples = samples
        self.samplings = [replace(sampling, seed=seed + i) for i in range(len(samples))]
        tokenizer, train, validation = open_data(data)
        held_out = part(validation, tokenizer, validation_documents)
        self.held_out = [decode(held_out, i, tokenizer) for i in range(held_out.n_documents)]
        is_built_in = all(sample.is_built_in for sample in samples)
        self._measures = StoryMeasures(part_of_text(train, tokenizer), self.held_out, checks_cast=is_built_in)
        self.about = {
            "data": str(data),
            "instructions": len(samples),
            "sampling": {k: v for k, v in asdict(sampling).items() if k != "seed"},
            "seed": seed,
            "validation": {"documents": len(self.held_out), "characters": sum(map(len, self.held_out))},
            "checks_cast": is_built_in,
            "shortest_coherent": self._measures.shortest_coherent,
            "samples": [{"instruction": sample.prompt[-1]["content"], **sample.to_json()} for sample in samples],
        }
        own = [sample.story for sample in samples]
        self.reference = self._row(own, [True] * len(own))
        self.by_chance = counts(samples, [*own[1:], own[0]])

    def measure(self, llm: LLM, advance: Callable[[], None] = lambda: None) -> dict:
        """The figures of a model. `advance` is called after the validation and after each story. A model that was not trained on
        conversations gets no instruction: it writes stories without a prompt, whose measures are what they were before such training.

        Raises UserError if an instruction fills the model's context."""
        ask = lambda sample: llm.encode_prompt(sample.prompt if llm.tokenizer.is_chat else "")
        prompts = [ask(sample) for sample in self.samples]
        _, bits = loss_of_texts(llm, self.held_out)
        advance()
        texts, is_complete = [""] * len(prompts), [False] * len(prompts)
        for i, _, done in llm.write_ids(prompts, self.samplings):
            if done:
                texts[i], is_complete[i] = done.text, done.finish_reason == "end"
                advance()
        return {"is_asked": llm.tokenizer.is_chat, "bits_per_char": bits} | self._row(texts, is_complete)

    def _row(self, texts: list[str], is_complete: list[bool]) -> dict:
        stories = []
        for sample, text, complete in zip(self.samples, texts, is_complete, strict=True):
            verdicts = [verdict._asdict() for verdict in sample.judge(text)]
            stories.append({"text": text, "verdicts": verdicts} | self._measures.story("", text, is_complete=complete))
        return counts(self.samples, texts) | self._measures.means(stories) | distinct_n(texts) | {"stories": stories}

    def report(self, rows: dict[str, dict]) -> dict:
        """The content of evaluate.json; `rows`: the figures by the model's name."""
        head = {"format": FORMAT, "version": VERSION, **self.about, "by_chance": self.by_chance, "reference": self.reference}
        return head | {"models": [{"model": name} | row for name, row in rows.items()]}


def counts(samples: Sequence[Sample], texts: Sequence[str]) -> dict:
    """How often requirements are met: `kinds` and `features`, each requirement by itself, and `together`, all of an instruction, by their
    number. Those that cannot be judged are left out."""
    by_kind: dict[str, list[Verdict]] = {kind: [] for kind in FIELDS}
    by_feature: dict[str, list[Verdict]] = {feature: [] for feature in FEATURES}
    together: dict[int, list[Verdict]] = {}
    for sample, text in zip(samples, texts, strict=True):
        verdicts = sample.judge(text)
        for requirement, verdict in zip(sample.requirements, verdicts, strict=True):
            if requirement.kind == "feature":
                by_feature[requirement.text].append(verdict)
            by_kind[requirement.kind].append(verdict)
        judged = [verdict for verdict in verdicts if verdict.share is not None]
        if judged and len(judged) == len(verdicts):
            is_met = all(verdict.is_met for verdict in judged)
            together.setdefault(len(judged), []).append(Verdict(is_met, sum(v.is_met or 0 for v in judged) / len(judged)))
    return {
        "kinds": {kind: rate(verdicts) for kind, verdicts in by_kind.items()},
        "features": {feature: rate(verdicts) for feature, verdicts in by_feature.items()},
        "together": {str(n): rate(together[n]) for n in sorted(together)},
    }


def rate(verdicts: Iterable[Verdict]) -> dict | None:
    """How many are met of those that can be judged, with the 95 % interval, and the mean share. None if there is none."""
    shares = [(verdict.is_met, verdict.share) for verdict in verdicts if verdict.share is not None]
    if not shares:
        return None
    n, met = len(shares), sum(bool(is_met) for is_met, _ in shares)
    low, high = wilson_interval(met, n)
    return {"met": met, "of": n, "rate": met / n, "low": low, "high": high, "share": sum(share for _, share in shares) / n}


def context_of(folder: Path) -> int:
    """The context of a checkpoint, or of the newest one of a run."""
    return read_json(find_checkpoint(folder), "config.json")["max_position_embeddings"]


def data_of(folders: Sequence[Path]) -> Path:
    """The data folder with which the first of the models was trained that has one. Raises UserError if there is none."""
    looked = []
    for folder in folders:
        checkpoint = find_checkpoint(folder)
        source = read_config(checkpoint)["data.source"]
        if source is not None:
            data = checkpoint.resolve().parent / "data" if source == "built-in" else Path(source)
            if all((data / name).is_dir() for name in ("tokenizer", "train", "validation")):
                return data
            looked.append(str(data))
    raise UserError(f"the data of the models is missing ({', '.join(looked) or 'they were imported'}); give its folder as --data")
