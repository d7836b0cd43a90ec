"""A finished or running training run, as the evaluation reads it: checkpoints, config and data."""

from dataclasses import dataclass
from pathlib import Path

from ..common.errors import UserError
from ..data.shards import Split
from ..data.tokenizer import Tokenizer
from ..model import run_folder
from ..model.checkpoint import read_json

CONFIG_KEYS = ("data.source", "data.document_mask", "train.context", "train.micro_batch", "log.prompts")  # the keys that are read here


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
        being_written = run_folder.being_written(folder)
        checkpoints = run_folder.step_folders(folder)
        if not checkpoints and being_written:
            raise UserError(f"{folder} has no complete checkpoint; {being_written[-1]} is being written, try again after it")
        if not checkpoints:
            found = run_folder.listing(folder)
            raise FileNotFoundError(
                f"{folder} has no checkpoints (step-…; found: {found}); give the out_dir of a run, such as out/quickstart"
            )
        newest = list(checkpoints.values())[-1]
        config = read_json(newest / "trainer", "trainer.json").get("config", {})
        if missing := [key for key in CONFIG_KEYS if key not in config]:
            raise UserError(
                f"{newest / 'trainer' / 'trainer.json'} lacks keys of the run's config ({', '.join(missing)}); "
                f"move {newest.name} away if an older checkpoint has them, or give a run of this version of train.py"
            )
        return cls(folder, checkpoints, config, tuple(name for name in being_written if not (folder / name).exists()))

    @property
    def newest(self) -> Path:
        return list(self.checkpoints.values())[-1]

    @property
    def is_built_in(self) -> bool:
        """Whether the run trained on the built-in stories, whose characters and things are known."""
        return self.config["data.source"] == "built-in"

    def data(self, tokenizer: Tokenizer, folder: Path | None = None) -> tuple[Split, Split]:
        """The splits train and validation of the run, or of another data `folder`.

        Raises FileNotFoundError or UserError if one is missing, damaged, or made with another tokenizer."""
        folder = folder or (self.folder / "data" if self.is_built_in else Path(self.config["data.source"]))
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}, the data of {self.folder}, is missing; start where train.py was started, or give --data")
        splits = Split.open(folder / "train", verify=False), Split.open(folder / "validation")
        for split in splits:
            if split.tokenizer_hash != tokenizer.hash:
                raise UserError(f"{split.folder} was made with another tokenizer than {self.newest}; give the run's own data with --data")
        return splits

    def validation_settings(self, context: int) -> dict:
        """The arguments that the run itself gave to `validate`, for a model with this context."""
        sizes = {"micro_batch": self.config["train.micro_batch"], "document_mask": self.config["data.document_mask"]}
        return {"context": self.config["train.context"] or context, **sizes}
