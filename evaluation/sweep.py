"""What a run's checkpoints write, step by step: validation, samples with the same seeds for each, and measures of them.

One model stays in memory; the weights of one checkpoint after another are copied into it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from ..common.errors import UserError
from ..data.shards import Split, evenly
from ..data.tokenizer import Tokenizer
from ..inference.llm import LLM
from ..inference.sampling import Sampling
from ..model import run_folder
from ..model.checkpoint import gpt_config, load_weights, read_json
from ..stories.facts import cast
from .measures import CorpusIndex, distinct, ends_properly, longest_loop, repeated_share
from .validation import part, validate

FORMAT, VERSION = "tritale-sweep", 1
OVERLAP_CHARACTERS = 8_000_000  # of the training text, looked through for copied stretches: 400 MB and 5 s while its index is made
REPEATS, COHERENT = 0.05, (0.9, 0.75, 0.5)
SHORTEST = 0.5  # of the shortest real story: a coherent one is at least as long
CONFIG_KEYS = ("data.source", "data.document_mask", "train.context", "train.micro_batch", "log.prompts")  # what is read here


@dataclass(frozen=True)
class Run:
    """The folder of a run, with its finished checkpoints in order and the config they were trained with."""

    folder: Path
    checkpoints: dict[int, Path]
    config: dict  # {"train.context": None, …}
    being_written: tuple[str, ...]  # names of the checkpoints that are not finished

    @classmethod
    def open(cls, folder: Path | str) -> "Run":
        """Raises FileNotFoundError or ValueError where the folder is not that of a run with at least one finished checkpoint."""
        folder = Path(folder)
        run_folder.check_is_final(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; give the out_dir of a run, such as out/quickstart")
        if (folder / "config.json").exists():
            raise UserError(f"{folder} is a checkpoint, not a run; give the folder that holds it, {folder.parent}")
        writing = tuple(run_folder.being_written(folder))
        checkpoints = run_folder.step_folders(folder)
        if not checkpoints and writing:
            raise UserError(
                f"{folder} has no finished checkpoint; {writing[-1]} is being written at this moment, try again when it is there"
            )
        if not checkpoints:
            found = sorted(p.name for p in folder.iterdir())[:5]
            raise FileNotFoundError(
                f"{folder} has no checkpoints (step-…; found: {found}); give the out_dir of a run, such as out/quickstart"
            )
        newest = list(checkpoints.values())[-1]
        config = read_json(newest / "trainer", "trainer.json").get("config", {})
        if missing := [key for key in CONFIG_KEYS if key not in config]:
            raise UserError(
                f"{newest / 'trainer' / 'trainer.json'} does not say how the run was trained (not in its config: {', '.join(missing)}); "
                f"move {newest.name} away if an older checkpoint has it, or give a run that this version of train.py made"
            )
        return cls(folder, checkpoints, config, tuple(name for name in writing if not (folder / name).exists()))

    @property
    def is_built_in(self) -> bool:
        """Whether it learnt the built-in stories, whose people and things are known."""
        return self.config["data.source"] == "built-in"

    def data(self, folder: Path | None = None) -> tuple[Split, Split]:
        """(train, validation) of the run's data, or of another `folder` with its data.

        Raises FileNotFoundError or ValueError where it is not there or damaged."""
        folder = folder or (self.folder / "data" if self.is_built_in else Path(self.config["data.source"]))
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}, the data of {self.folder}, is not there; start in the folder it was trained in, or give --data"
            )
        return Split.open(folder / "train", verify=False), Split.open(folder / "validation")

    def eval_sizes(self, context: int) -> dict:
        """The arguments of `validate` as the run's own."""
        sizes = {"micro_batch": self.config["train.micro_batch"], "document_mask": self.config["data.document_mask"]}
        return {"context": self.config["train.context"] or context, **sizes}


def every_nth(checkpoints: dict[int, Path], every: int) -> dict[int, Path]:
    """Each `every`-th checkpoint (the 20th, 40th, …), and the last. Raises ValueError for `every` below 1."""
    if every < 1:
        raise UserError(f"--every is {every}; it must be at least 1 (each checkpoint)")
    steps = list(checkpoints)
    chosen = steps[every - 1 :: every]
    return {step: checkpoints[step] for step in dict.fromkeys([*chosen, steps[-1]])}


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, blank lines left out. Raises FileNotFoundError, or ValueError where there is none or the file is not UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path} is not a file; write one prompt a line into it")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); convert it, for example: iconv -f GB18030 -t UTF-8 {path}") from None
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise UserError(f"{path} has no prompts; write one a line into it")
    return prompts


class Sweep:
    """The measures of one run's checkpoints. Made once, it holds the model, the validation documents and an index of the training text.

    Raises ValueError where a prompt fills the context, a setting is out of range, or data and checkpoints do not belong together."""

    def __init__(
        self,
        run: Run,
        *,
        prompts: list[str],
        samples: int,
        sampling: Sampling,
        seed: int = 0,
        validation_documents: int = 200,
        data: Path | None = None,
        device: str | None = None,
    ):
        if samples < 1 or validation_documents < 1:
            raise UserError(f"--samples ({samples}) and --validation-documents ({validation_documents}) must be at least 1")
        self.run, self.sampling, self.seed = run, sampling, seed
        self.prompts = [prompt for prompt in prompts for _ in range(samples)]
        newest = list(run.checkpoints.values())[-1]
        self.llm = LLM.load(newest, device=device)
        self._tokenizer_json = (newest / "tokenizer.json").read_text(encoding="utf-8")
        for prompt in prompts:
            self.llm.encode_prompt(prompt)  # one that is too long is named before the work begins
        tokenizer = self.llm.tokenizer
        train, validation = run.data(data)
        for split in (train, validation):
            if split.tokenizer_hash != tokenizer.hash:
                raise UserError(f"{split.folder} was made with another tokenizer than {newest}; give the run's own data with --data")
        self.validation = part(validation, tokenizer, validation_documents)
        floor = validation.entropy_bits and validation.entropy_bits / validation.characters
        n_documents = max(1, int(train.n_documents * min(1, OVERLAP_CHARACTERS / train.characters)))
        texts = [decode(train, i, tokenizer) for i in evenly(train.n_documents, n_documents)]
        self._index = CorpusIndex(texts)
        self.about = {
            "run": str(run.folder),
            "prompts": prompts,
            "samples": samples,
            "sampling": {k: v for k, v in asdict(sampling).items() if k not in ("seed", "stop")},
            "seed": seed,
            "validation": {
                "documents": self.validation.n_documents,
                "of_documents": validation.n_documents,
                "characters": self.validation.characters,
                "entropy_bits_per_char": floor,
            },
            "overlap": {"characters": sum(map(len, texts)), "of_characters": train.characters},
            "checks_cast": run.is_built_in,
        }
        real = [decode(self.validation, i, tokenizer) for i in range(self.validation.n_documents)]
        self.about["shortest_coherent"] = math.ceil(SHORTEST * min(map(len, real)))
        stories = [self._story("", 0, text, None, is_whole=True) for text in real]
        self.reference = self._summary(stories) | distinct_n([real[i] for i in evenly(len(real), len(self.prompts))])

    def load(self, folder: Path) -> None:
        """Copy a checkpoint's weights into the model. Raises FileNotFoundError or ValueError where it is damaged, gone or of another
        shape."""
        if gpt_config(read_json(folder, "config.json")) != self.llm.model.config:
            raise UserError(f"{folder} has another shape than the newest checkpoint")
        if (folder / "tokenizer.json").read_text(encoding="utf-8") != self._tokenizer_json:
            raise UserError(f"{folder} has another tokenizer than the newest checkpoint")
        load_weights(self.llm.model, folder)

    def measure(self, step: int, advance: Callable[[], None] = lambda: None) -> dict:
        """What the weights that are loaded do; `advance` is called after validation and after each story.

        Raises ValueError where their validation is not a finite number."""
        model = self.llm.model
        val_loss, val_bits = validate(model, self.validation, **self.run.eval_sizes(model.config.context))
        if not math.isfinite(val_bits):
            raise UserError(f"its validation is {val_bits}: the weights are not finite numbers, or too large")
        advance()
        samplings = [Sampling(**asdict(self.sampling) | {"seed": self.seed + i}) for i in range(len(self.prompts))]
        stories: list[dict] = [{}] * len(self.prompts)
        n_samples = self.about["samples"]
        for i, _, done in self.llm.write(self.prompts, samplings):
            if done:
                is_whole = done.finish_reason == "end"
                stories[i] = self._story(self.prompts[i], i % n_samples, done.text, len(done.tokens), is_whole=is_whole)
                advance()
        head = {"step": step, "val_loss": val_loss, "val_bits_per_char": val_bits}
        return head | self._summary(stories) | distinct_n([s["text"] for s in stories]) | {"stories": stories}

    def _story(self, prompt: str, sample: int, text: str, n_tokens: int | None, *, is_whole: bool) -> dict:
        # Repetition, length and overlap are those of what the model wrote; people, ending and whether it is too short those of the whole
        # story. But people whom the prompt alone names are not kept.
        loop = longest_loop(text)
        story = {
            "prompt": prompt,
            "sample": sample,
            "text": text,
            "tokens": n_tokens,
            "repeated_4grams": repeated_share(text),
            "loop": [loop.start, loop.end, loop.piece] if loop else None,
            "ends_properly": is_whole and ends_properly(prompt + text),
            "overlap": list(self._index.longest_overlap(text)),
        }
        found = cast(prompt + text) if self.run.is_built_in else None
        story["cast"] = found and asdict(found)
        story["is_consistent"] = found and found.is_consistent and bool(cast(text).heroes)
        is_long_enough = len(prompt + text) >= self.about["shortest_coherent"]
        story["is_coherent"] = (
            story["ends_properly"] and is_long_enough and story["repeated_4grams"] < REPEATS and story["is_consistent"] is not False
        )
        return story

    def _summary(self, stories: list[dict]) -> dict:
        # Means and shares over the stories. Distinct-n is not among them: it is one number of all texts together.
        loops = [s["loop"][1] - s["loop"][0] if s["loop"] else 0 for s in stories]
        overlaps = [s["overlap"][1] - s["overlap"][0] for s in stories]
        return {
            "repeated_4grams": mean(s["repeated_4grams"] for s in stories),
            "longest_loop": mean(loops),
            "longest_loop_max": max(loops),
            "length": mean(len(s["text"]) for s in stories),
            "ends_properly": mean(s["ends_properly"] for s in stories),
            "consistent": mean(s["is_consistent"] for s in stories) if self.run.is_built_in else None,
            "coherent": mean(s["is_coherent"] for s in stories),
            "overlap": mean(overlaps),
            "overlap_max": max(overlaps),
        }

    def report(self, rows: list[dict], left_out: dict[str, str]) -> dict:
        """All of it as JSON has it."""
        head = {"format": FORMAT, "version": VERSION, **self.about, "left_out": left_out, "reference": self.reference}
        return head | {"findings": findings(rows, self.reference, self.about), "checkpoints": rows}


def decode(split: Split, i: int, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(split.document(i).tolist())


def distinct_n(texts: list[str]) -> dict:
    return {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)}


def lasting(rows: Iterable[dict], holds: Callable[[dict], bool]) -> int | None:
    """The first step from which on `holds` is true of every row; None where it is not of the last."""
    first = None
    for row in rows:
        if not holds(row):
            first = None
        elif first is None:
            first = row["step"]
    return first


def findings(rows: list[dict], reference: dict, about: dict) -> list[str]:
    """What the rows say, in sentences."""
    first, last, n = rows[0], rows[-1], len(rows[-1]["stories"])
    says, floor = [], about["validation"]["entropy_bits_per_char"]

    def since(step: int) -> str:
        return f"from step {step:,} on" if step != first["step"] else f"at every checkpoint looked at (from step {step:,} on)"

    best = min(rows, key=lambda row: row["val_bits_per_char"])
    text = f"Validation goes from {first['val_bits_per_char']:.3f} bits per character at step {first['step']:,} to "
    text += f"{last['val_bits_per_char']:.3f} at step {last['step']:,}"
    text += "" if best is last else f"; the lowest is {best['val_bits_per_char']:.3f} at step {best['step']:,}"
    says.append(text + (f". Chance alone puts {floor:.3f} into the stories." if floor else "."))

    real = f"real stories: {reference['repeated_4grams']:.1%}"
    step = lasting(rows, lambda row: row["repeated_4grams"] < REPEATS)
    if step is None:
        says.append(
            f"Repetition is still {last['repeated_4grams']:.1%} of all 4-grams at step {last['step']:,}, not below {REPEATS:.0%} ({real})."
        )
    else:
        verb = "falls" if step != first["step"] else "is"
        says.append(f"Repetition {verb} below {REPEATS:.0%} of all 4-grams {since(step)} ({real}).")

    means = "it ends properly, " + ("keeps to its people and its thing, " if about["checks_cast"] else "")
    means += f"has at least {about['shortest_coherent']} characters, and repeats less than {REPEATS:.0%}"
    for share in COHERENT:
        step = lasting(rows, lambda row, share=share: row["coherent"] >= share)
        if step is not None:
            text = f"Coherent {since(step)}: at least {share:.0%} of the {n} stories ({means})"
            says.append(f"{text}; {last['coherent']:.0%} at step {last['step']:,}.")
            break
    else:
        says.append(f"Not coherent yet: {last['coherent']:.0%} of the {n} stories at step {last['step']:,} ({means}).")

    text = f"The longest stretch taken over from the training text is {last['overlap']:.0f} characters a story at step {last['step']:,}; "
    says.append(text + f"real stories that were held out share {reference['overlap']:.0f}.")
    return says


def check_outputs(folder: Path) -> tuple[Path, Path]:
    """(sweep.json, sweep.html) of the folder. Raises ValueError where one is there that no sweep has written."""
    paths = folder / "sweep.json", folder / "sweep.html"
    marks = f'"format": "{FORMAT}"', 'name="generator" content="tritale sweep"'
    for path, mark in zip(paths, marks, strict=True):
        if path.exists() and not (path.is_file() and mark in path.read_text(encoding="utf-8", errors="replace")[:2000]):
            raise UserError(f"{path} exists and is not the result of a sweep, so it is not overwritten; move it away")
    return paths
