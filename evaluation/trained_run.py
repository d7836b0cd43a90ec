"""A finished or running training run, as the evaluation reads it: checkpoints, config and data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common import run_folder
from ..common.errors import UserError
from ..data.shards import Split
from ..data.tokenizer import Tokenizer
from ..model.checkpoint import read_json
from ..model.gpt import GPT
from ..training import processes

# The keys of the config that are read here, and whether a value is valid.
CONFIG: dict[str, Callable[[Any], bool]] = {
    "data.source": lambda value: isinstance(value, str),
    "data.document_mask": lambda value: isinstance(value, bool),
    "train.context": lambda value: value is None or (type(value) is int and value > 0),
    "train.micro_batch": lambda value: type(value) is int and value > 0,
    "train.precision": lambda value: value in ("auto", "fp32", "bf16", "fp16"),
    "log.prompts": lambda value: isinstance(value, list) and all(isinstance(prompt, str) for prompt in value),
}


def read_config(checkpoint: Path) -> dict:
    """The config in trainer/trainer.json, of which the keys of CONFIG are present and have valid values. An imported checkpoint
    (`tritale import`) has none; its data.source is None.

    Raises FileNotFoundError if the file is missing, UserError if it is damaged."""
    if "tritale_import" in read_json(checkpoint, "config.json"):
        return {"data.source": None, "log.prompts": []}
    config = read_json(checkpoint / "trainer", "trainer.json").get("config")
    config = config if isinstance(config, dict) else {}
    wrong = [key for key, is_valid in CONFIG.items() if not is_valid(config.get(key, ...))]
    if wrong:
        reasons = "; ".join(f"{key} is {config[key]!r}" if key in config else f"{key} is missing" for key in wrong)
        raise UserError(
            f"{checkpoint / 'trainer' / 'trainer.json'} lacks the run's config ({reasons}); "
            f"move {checkpoint.name} away if an older checkpoint has it, or give a run of this version of train.py"
        )
    return config


@dataclass(frozen=True)
class TrainedRun:
    """The out_dir of a run with its complete checkpoints in ascending order and the newest one's config."""

    folder: Path
    checkpoints: dict[int, Path]
    config: dict  # {"train.context": None, …}
    being_written: tuple[str, ...]  # names of incomplete checkpoints

    @classmethod
    def open(cls, folder: Path | str) -> "TrainedRun":
        """Raises FileNotFoundError or UserError if the folder is not a run with at least one complete checkpoint."""
        folder = Path(folder)
        run_folder.check_is_final(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; give the out_dir of a run, such as out/quickstart")
        if (folder / "config.json").exists():
            raise UserError(f"{folder} is a checkpoint, not a run; give the folder that contains it, {folder.parent}")
        run_folder.check_is_not_foreign(folder)
        being_written = run_folder.being_written(folder)
        checkpoints = run_folder.step_folders(folder)
        if not checkpoints and being_written:
            raise UserError(f"{folder} has no complete checkpoint; {being_written[-1]} is being written, try again after it")
        if not checkpoints:
            found = run_folder.listing(folder)
            raise FileNotFoundError(
                f"{folder} has no checkpoints (step-…; found: {found}); give the out_dir of a run, such as out/quickstart"
            )
        config = read_config(list(checkpoints.values())[-1])
        return cls(folder, checkpoints, config, tuple(name for name in being_written if not (folder / name).exists()))

    @property
    def newest(self) -> Path:
        return list(self.checkpoints.values())[-1]

    @property
    def is_built_in(self) -> bool:
        """Whether the run trained on the built-in stories, whose characters and things are known."""
        return self.config["data.source"] == "built-in"

    @property
    def is_imported(self) -> bool:
        """Whether another program trained the checkpoints, so that neither the run's data nor its config is known."""
        return self.config["data.source"] is None

    def data_tokenizer(self, tokenizer: Tokenizer, data: Path | None) -> Tokenizer:
        """The tokenizer of the data: the model's `tokenizer`, or for imported checkpoints that of the folder `data`."""
        if not self.is_imported:
            return tokenizer
        if data is None:
            raise UserError(
                f"{self.folder} was imported without its data; prepare its text with tritale prepare, and give that folder as --data"
            )
        return Tokenizer.load(data / "tokenizer")

    def split(self, name: str, tokenizer: Tokenizer, data: Path | None = None) -> Split:
        """The split train or validation of the run, or of the folder `data`, in the tokens of `tokenizer`.

        Raises FileNotFoundError or UserError if it is missing, damaged, or made with another tokenizer."""
        folder = data or (self.folder / "data" if self.is_built_in else Path(self.config["data.source"]))
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}, the data of {self.folder}, is missing; start where train.py was started, or give --data")
        split = Split.open(folder / name)
        if not split.is_of(tokenizer):
            raise UserError(f"{split.folder} was made with another tokenizer than {self.newest}; give the run's own data with --data")
        return split

    def validation_settings(self, model: GPT) -> dict:
        """The arguments that the run itself gave to `validate`, for a model of this shape: on a GPU with autocast, unless it trained in
        fp32; on a CPU without."""
        device, context = model.embedding.device, self.config["train.context"] or model.config.context
        if context > model.config.context:
            raise UserError(
                f"{self.newest / 'trainer' / 'trainer.json'} has a train.context of {context}, longer than the model's "
                f"({model.config.context}); the file was changed after the run, use a copy of the run"
            )
        is_half = device.type == "cuda" and self.config["train.precision"] != "fp32"
        return {
            "context": context,
            "micro_batch": self.config["train.micro_batch"],
            "document_mask": self.config["data.document_mask"],
            "autocast": processes.autocast(device, processes.choose_precision("auto", device) if is_half else "fp32"),
        }
