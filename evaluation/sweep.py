"""Compare the checkpoints of a run: validation, generated stories with the same seeds at each checkpoint, and measures of them.

The model is built once, and the weights of each checkpoint are copied into it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from ..common.errors import UserError
from ..common.sampling import Sampling
from ..data.shards import evenly
from ..inference.llm import LLM
from ..model.checkpoint import EMA, WEIGHTS, load_weights, read_shape
from .story_measures import REPEATS, StoryMeasures, decode, distinct_n, part_of_text
from .trained_run import TrainedRun
from .validation import part, validate

FORMAT, VERSION = "tritale-sweep", 1
COHERENT = (0.9, 0.75, 0.5)  # shares of coherent stories that a finding names


def every_nth(checkpoints: dict[int, Path], every: int) -> dict[int, Path]:
    """Each `every`-th checkpoint (the 20th, 40th, …) and the last. Raises UserError if `every` is below 1."""
    if every < 1:
        raise UserError(f"--every is {every}; it must be at least 1 (each checkpoint)")
    steps = list(checkpoints)
    return {step: checkpoints[step] for step in dict.fromkeys([*steps[every - 1 :: every], steps[-1]])}


class Sweep:
    """Measures the checkpoints of one run. It holds the model, the validation documents and an index of the training text.

    Raises UserError if a prompt fills the context, a setting is out of range, or data and checkpoints do not belong together."""

    def __init__(
        self,
        run: TrainedRun,
        *,
        prompts: list[str],
        samples: int,
        sampling: Sampling,
        seed: int = 0,
        validation_documents: int = 200,
        data: Path | None = None,
        device: str | None = None,
        ema: bool = False,
    ):
        if samples < 1 or validation_documents < 1:
            raise UserError(f"--samples ({samples}) and --validation-documents ({validation_documents}) must be at least 1")
        self.run = run
        self.prompts = [prompt for prompt in prompts for _ in range(samples)]
        self.samplings = [replace(sampling, seed=seed + i) for i in range(len(self.prompts))]
        self.llm, self.weights = LLM.load(run.newest, device=device, ema=ema), EMA if ema else WEIGHTS
        self._tokenizer_json = (run.newest / "tokenizer.json").read_bytes()
        for prompt in prompts:
            self.llm.encode_prompt(prompt)  # raises if it is too long, before the slow work
        tokenizer = run.data_tokenizer(self.llm.tokenizer, data)
        train, validation = (run.split(name, tokenizer, data) for name in ("train", "validation"))
        self.validation = part(validation, tokenizer, validation_documents)
        texts = part_of_text(train, tokenizer)
        self.held_out = held_out = [decode(self.validation, i, tokenizer) for i in range(self.validation.n_documents)]
        self.measures = StoryMeasures(texts, held_out, checks_cast=run.is_built_in)
        self.about = {
            "run": str(run.folder),
            "prompts": prompts,
            "samples": samples,
            "sampling": {k: v for k, v in asdict(sampling).items() if k != "seed"},
            "seed": seed,
            "validation": {
                "documents": self.validation.n_documents,
                "of_documents": validation.n_documents,
                "characters": self.validation.characters,
                "entropy_bits_per_char": validation.entropy_bits and validation.entropy_bits / validation.characters,
            },
            "overlap": {"characters": sum(map(len, texts)), "of_characters": train.characters},
            "checks_cast": run.is_built_in,
            "shortest_coherent": self.measures.shortest_coherent,
        }
        stories = [self._story("", 0, text, None, is_complete=True) for text in held_out]
        self.reference = self.measures.means(stories) | distinct_n([held_out[i] for i in evenly(len(held_out), len(self.prompts))])

    def load(self, folder: Path) -> None:
        """Copy the weights of a checkpoint into the model. Raises FileNotFoundError or UserError if it is damaged, missing or of another
        shape."""
        if read_shape(folder) != self.llm.model.config:
            raise UserError(f"{folder} has another shape than the newest checkpoint")
        if (folder / "tokenizer.json").read_bytes() != self._tokenizer_json:
            raise UserError(f"{folder} has another tokenizer than the newest checkpoint")
        load_weights(self.llm.model, folder, name=self.weights)

    def measure(self, step: int, advance: Callable[[], None] = lambda: None) -> dict:
        """Measure the loaded weights. `advance` is called after the validation and after each story.

        Raises UserError if the validation loss is not finite."""
        model = self.llm.model
        if self.run.is_imported:
            val_loss, val_bits = loss_of_texts(self.llm, self.held_out)
        else:
            val_loss, val_bits = validate(model, self.validation, **self.run.validation_settings(model))
        if not math.isfinite(val_bits):
            raise UserError(f"its validation is {val_bits}: the weights are not finite numbers, or too large")
        advance()
        stories: list[dict] = [{}] * len(self.prompts)
        for i, _, done in self.llm.write(self.prompts, self.samplings):
            if done:
                sample, is_complete = i % self.about["samples"], done.finish_reason == "end"
                stories[i] = self._story(self.prompts[i], sample, done.text, len(done.tokens), is_complete=is_complete)
                advance()
        head = {"step": step, "val_loss": val_loss, "val_bits_per_char": val_bits}
        return head | self.measures.means(stories) | distinct_n([s["text"] for s in stories]) | {"stories": stories}

    def _story(self, prompt: str, sample: int, text: str, n_tokens: int | None, *, is_complete: bool) -> dict:
        measured = self.measures.story(prompt, text, is_complete=is_complete)
        return {"prompt": prompt, "sample": sample, "text": text, "tokens": n_tokens} | measured

    def report(self, rows: list[dict], left_out: dict[str, str]) -> dict:
        """The content of sweep.json. `left_out`: {checkpoint: reason}."""
        head = {"format": FORMAT, "version": VERSION, **self.about, "left_out": left_out, "reference": self.reference}
        return head | {"findings": findings(rows, self.reference, self.about), "checkpoints": rows}


def loss_of_texts(llm: LLM, texts: list[str]) -> tuple[float, float]:
    """(loss in nats per token, bits per character) on texts of any origin. The end of a text is not counted."""
    bits = sum(len(text) * llm.bits_per_char(text) for text in texts)
    return bits * math.log(2) / sum(len(llm.tokenizer.encode(text)) for text in texts), bits / sum(map(len, texts))


def first_step_that_lasts(rows: Iterable[dict], condition: Callable[[dict], bool]) -> int | None:
    """The first step from which `condition` is true of every row, or None if it is false for the last."""
    first = None
    for row in rows:
        if not condition(row):
            first = None
        elif first is None:
            first = row["step"]
    return first


def findings(rows: list[dict], reference: dict, about: dict) -> list[str]:
    """The main results of the rows, in sentences."""
    first, last, n = rows[0], rows[-1], len(rows[-1]["stories"])
    stories = f"the {n} stories" if n > 1 else "1 story"
    entropy = about["validation"]["entropy_bits_per_char"]

    def from_step(step: int) -> str:
        if len(rows) == 1:
            return f"at step {step:,}"
        return f"from step {step:,} on" if step != first["step"] else f"at every measured checkpoint, from step {step:,} on"

    best = min(rows, key=lambda row: row["val_bits_per_char"])
    validation = f"Validation: {first['val_bits_per_char']:.3f} bits per character at step {first['step']:,}"
    validation += f", {last['val_bits_per_char']:.3f} at step {last['step']:,}" if len(rows) > 1 else ""
    validation += "" if best is last else f"; the lowest is {best['val_bits_per_char']:.3f} at step {best['step']:,}"
    validation += f". The entropy of the stories, a lower bound, is {entropy:.3f}." if entropy else "."

    held_out = f"held-out stories: {reference['repeated_4grams']:.1%}"
    step = first_step_that_lasts(rows, lambda row: row["repeated_4grams"] < REPEATS)
    if step is None:
        share = f"{last['repeated_4grams']:.1%} of all 4-grams at step {last['step']:,}"
        repetition = f"Repetition is still {share}, not below {REPEATS:.0%} ({held_out})."
    else:
        verb = "falls" if step != first["step"] else "is"
        repetition = f"Repetition {verb} below {REPEATS:.0%} of all 4-grams {from_step(step)} ({held_out})."

    definition = "a coherent story ends properly, " + ("has a consistent cast, " if about["checks_cast"] else "")
    definition += f"has at least {about['shortest_coherent']} characters, and repeats less than {REPEATS:.0%}"
    coherent = f"Not coherent yet: {last['coherent']:.0%} of {stories} at step {last['step']:,} ({definition})."
    for share in COHERENT:
        step = first_step_that_lasts(rows, lambda row, share=share: row["coherent"] >= share)
        if step is not None:
            coherent = f"Coherent {from_step(step)}: at least {share:.0%} of {stories} ({definition})"
            coherent += f"; {last['coherent']:.0%} at step {last['step']:,}."
            break

    copied = f"The longest stretch copied from the training text has {last['overlap']:.0f} characters per story at step {last['step']:,}; "
    copied += f"held-out stories share {reference['overlap']:.0f}."
    return [validation, repetition, coherent, copied]


def check_outputs(folder: Path, command: str = "sweep", format: str = FORMAT) -> list[Path]:
    """Those of <command>.json and <command>.html that exist in the folder, which is created if it is missing.

    Raises UserError if the command has not written one of them, OSError if the folder cannot be created."""
    folder.mkdir(parents=True, exist_ok=True)  # before minutes of work
    marks = {f"{command}.json": f'"format": "{format}"', f"{command}.html": f'name="generator" content="tritale {command}"'}
    existing = [folder / name for name in marks if (folder / name).exists()]
    for path in existing:
        content = path.read_text(encoding="utf-8", errors="replace")[:2000] if path.is_file() else None
        if content is None or (content and marks[path.name] not in content):
            raise UserError(f"{path} exists and is not the result of tritale {command}, so it is not overwritten; move it away")
    return existing
