"""The folder of a run. out_dir/step-00001000/ holds the checkpoint after 1,000 steps.

A checkpoint is written under a temporary name (`common.files.atomic_folder`), so a folder with a step's name is complete.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from .errors import UserError
from .files import final_name

STEP_FOLDER = re.compile(r"step-(\d{8,})")
CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.json")
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"  # of a LoRA run, in place of model.safetensors


def step_folder(out_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return out_dir / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in the folder's name, or None if it is not named after one."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def step_folders(out_dir: Path) -> dict[int, Path]:
    """{step: folder} of the checkpoints in `out_dir`, in ascending order."""
    found = {step: path for path in out_dir.glob("step-*") if (step := step_of(path)) is not None and path.is_dir()}
    return dict(sorted(found.items()))


def being_written(out_dir: Path) -> list[str]:
    """Names of the checkpoints that are being written, or that a killed process left unfinished, in ascending order."""
    names = {name for path in out_dir.iterdir() if (name := final_name(path)) and STEP_FOLDER.fullmatch(name) and path.suffix == ".tmp"}
    return sorted(names)


def check_is_final(folder: Path) -> None:
    """Raises UserError if the folder is the temporary one of a checkpoint that is being written."""
    if name := final_name(folder):
        raise UserError(
            f"{folder} is the temporary folder of {name}, which is being written or was left by a killed run; "
            f"wait for {folder.parent / name}, or give an earlier step"
        )


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint holds an adapter of another checkpoint, and no weights of its own."""
    return (folder / ADAPTER_CONFIG).is_file()


def weights_of(folder: Path) -> Path:
    """The file of a checkpoint's weights, or of its adapter."""
    return folder / (ADAPTER if is_adapter(folder) else "model.safetensors")


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder has its final name and the files of a checkpoint."""
    names = [weights_of(folder).name if name == "model.safetensors" else name for name in CHECKPOINT_FILES]
    return final_name(folder) is None and all((folder / name).is_file() for name in names)


def find_checkpoints(folder: Path) -> dict[str, Path]:
    """{name: folder} of the checkpoints in a run folder, newest step first; if `folder` is a checkpoint, only that one.

    Raises FileNotFoundError or UserError if there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give a run such as out/quickstart, or one of its step-… folders")
    folder = folder.resolve()
    check_is_final(folder)
    if is_checkpoint(folder):
        return {folder.name: folder}
    check_is_not_foreign(folder)
    found = sorted(filter(is_checkpoint, folder.iterdir()), key=lambda p: (step_of(p) or -1, p.name), reverse=True)
    if not found:
        raise FileNotFoundError(
            f"{folder} is neither a checkpoint ({', '.join(CHECKPOINT_FILES)}) nor a run with checkpoints in it "
            f"(found: {listing(folder)}); give a run such as out/quickstart after its first step-… folder is written"
        )
    return {p.name: p for p in found}


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint folder itself, or the newest checkpoint of a run. Raises FileNotFoundError or UserError if there is none."""
    check_is_final(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give a run such as out/quickstart, or one of its step-… folders")
    if not is_checkpoint(folder):
        check_is_not_foreign(folder)
        if steps := step_folders(folder):
            return steps[max(steps)]
    return folder


def check_is_not_foreign(folder: Path) -> None:
    """Raises UserError if the folder is a checkpoint of litgpt or one of Hugging Face in several files, or a run with such checkpoints."""
    for kind, program, name in (("litgpt", "litgpt", "lit_model.pth"), ("hf", "Hugging Face", "model.safetensors.index.json")):
        for path in (folder / name, *sorted(folder.glob(f"*/{name}"))[:1]):
            if path.is_file():
                command = f"tritale import {folder} --from {kind} --out NEW_FOLDER"
                raise UserError(f"{path.parent} is a {program} checkpoint; convert it first: {command}")


def listing(folder: Path, limit: int = 10) -> str:
    """The first names in a folder, for a message."""
    names: Iterable[str] = sorted(p.name for p in folder.iterdir())[:limit]
    return ", ".join(names) or "nothing"
