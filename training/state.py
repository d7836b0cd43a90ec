"""Checkpoints of a run. out_dir/step-00001000/ is a Hugging Face model; its folder trainer/ holds what a resumed run needs.

Only safetensors and JSON. The data needs no state: its order is a function of the step.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType

import torch
from safetensors import SafetensorError, safe_open

from ..common.errors import UserError
from ..common.files import atomic_folder, remove_folder, write_json
from ..data.tokenizer import Tokenizer
from ..model.checkpoint import CHECKSUMS, check_files, load_tensors, load_weights, read_json, save_model, save_tensors, write_checksums
from ..model.gpt import GPT
from ..model.run_folder import step_folder, step_folders
from .config import RunConfig, differences, flatten
from .optimizer import state_shapes
from .plan import size
from .step import TrainingStep

FORMAT = 1  # of trainer/; files without a number have format 1


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # optimizer steps done
    best_step: int | None = None  # the checkpoint with the lowest validation loss
    best_loss: float | None = None  # its validation loss
    seconds: float = 0.0  # of training, over all starts of the run


def newest_complete(out_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are undamaged. Reports each newer, damaged one to `warn` and leaves it unchanged.

    None if there is no checkpoint. Raises UserError if all are damaged: a new run would overwrite them."""
    for folder in reversed(step_folders(out_dir).values()):
        try:
            for path in (folder, folder / "trainer"):
                check_files(path)
            read_json(folder, "config.json")
            trainer = read_json(folder / "trainer", "trainer.json")
            check_trainer(folder, trainer)
            for path in (folder / CHECKSUMS, folder / "trainer" / CHECKSUMS):
                if "format" in trainer and not path.is_file():  # only earlier versions wrote none
                    raise FileNotFoundError(f"{path} is missing")
            for name in ("model.safetensors", "trainer/state.safetensors"):
                with safe_open(folder / name, "pt"):  # reads the header and compares it with the file's size
                    pass
            return folder
        except (OSError, ValueError, SafetensorError) as error:
            warn(f"{folder} is damaged ({error}) and not used")
    if step_folders(out_dir):
        raise UserError(f"no checkpoint in {out_dir} is complete; restore one, or move the step-… folders elsewhere to start from step 0")
    return None


def check_trainer(folder: Path, trainer: dict) -> None:
    """Raises UserError if trainer.json of this format lacks a key or has a value of another type."""
    number = (int, float)
    types = {
        "step": int,
        "seconds": number,
        "best_step": (int, NoneType),
        "best_loss": (*number, NoneType),
        "config": dict,
        "grad_scaler": dict,
    }
    wrong = [key for key, kind in types.items() if not isinstance(trainer.get(key, ...), kind)]
    if wrong and trainer.get("format", 1) == FORMAT:
        raise UserError(f"{folder}/trainer/trainer.json: {', '.join(wrong)} missing or of a wrong type")


def remove_leftovers(out_dir: Path) -> None:
    """Remove the temporary folders of a killed process."""
    for path in out_dir.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def save(out_dir: Path, step: TrainingStep, tokenizer: Tokenizer, progress: Progress) -> Path:
    """Write the checkpoint out_dir/step-…: the model, its tokenizer, the optimizers' state, the random state, the config and `progress`.

    Raises OSError that names the folder if it cannot be written, for example on a full disk. Earlier checkpoints stay complete."""
    folder = step_folder(out_dir, progress.step)
    names = parameter_names(step.model)
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for optimizer in step.optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"{names[p]}/{key}": value for key, value in state.items()}
    trainer = {"format": FORMAT, "config": flatten(step.config), "grad_scaler": step.scaler.state_dict(), **asdict(progress)}
    try:
        with atomic_folder(folder) as temporary:
            save_model(temporary, step.model, **tokenizer.special_ids)
            tokenizer.save(temporary, context=step.model.config.context)
            (temporary / "trainer").mkdir()
            save_tensors(temporary / "trainer" / "state.safetensors", tensors)
            write_json(temporary / "trainer" / "trainer.json", trainer)
            for path in (temporary, temporary / "trainer"):
                write_checksums(path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the checkpoint {folder} could not be written ({error}); earlier checkpoints are complete. It needs about "
            f"{size(sum(t.nbytes for t in (*step.model.parameters(), *tensors.values())))}: free some space, "
            "and run the same command again to resume"
        ) from error
    return folder


def read_trainer(folder: Path) -> dict:
    """trainer/trainer.json of a checkpoint. Raises UserError if a newer version of tritale wrote it."""
    trainer = read_json(folder / "trainer", "trainer.json")
    if trainer.get("format", 1) != FORMAT:
        raise UserError(
            f"{folder}/trainer/trainer.json has format {trainer['format']!r}, this version of tritale reads format {FORMAT}; "
            "resume with the version that wrote it, or choose another --out_dir"
        )
    return trainer


def check_config(folder: Path, config: RunConfig) -> None:
    """Raises UserError if the checkpoint's run had another config, or is beyond train.max_steps. With resume "force" only those keys are
    compared that the weights and the optimizer state depend on."""
    trainer = read_trainer(folder)
    changed = differences(trainer["config"], config)
    needed = [c for c in changed if c.startswith(("data.", "model.", "seed", "init_from", "optim.matrices"))]
    if needed and config.resume == "force":
        raise UserError(f"{folder.parent} cannot resume with {'; '.join(needed)}: choose another --out_dir, or restore the old values")
    if trainer["step"] > config.train.max_steps:
        raise UserError(
            f"{folder} is beyond train.max_steps ({config.train.max_steps}); set that to at least {trainer['step']}, "
            "or choose another --out_dir"
        )
    if changed and config.resume != "force":
        raise UserError(
            f"{folder.parent} holds a run with another config: {'; '.join(changed)}. Choose another --out_dir, restore the old values, "
            "or continue with the new ones with --resume force"
        )


def load(folder: Path, step: TrainingStep) -> Progress:
    """Restore the weights, the optimizers' state and the random state of a checkpoint.

    Raises FileNotFoundError if a file is missing, UserError if one is damaged."""
    trainer = read_trainer(folder)
    load_weights(step.model, folder)
    tensors = load_tensors(folder / "trainer", "state.safetensors")
    rng, rng_cuda = tensors.pop("rng.cpu", None), tensors.pop("rng.cuda", None)
    shapes = state_shapes(step.optimizers, parameter_names(step.model))
    if trainer["grad_scaler"] and not tensors:
        shapes = {}  # the gradient scaler has skipped all steps so far
    wrong = [name for name in shapes.keys() | tensors.keys() if not is_valid(tensors.get(name), shapes.get(name))]
    if rng is None or rng.dtype != torch.uint8 or rng.shape != torch.get_rng_state().shape:
        rng, wrong = torch.get_rng_state(), [*wrong, "rng.cpu"]
    if wrong:
        names = ", ".join(sorted(wrong)[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise UserError(
            f"{folder}/trainer/state.safetensors: {names} missing, unexpected, not finite, or of another shape or dtype than the model's; "
            "the checkpoint is damaged: move it elsewhere to resume from an earlier one"
        )
    torch.set_rng_state(rng)
    if rng_cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng_cuda)
    parameters = dict(step.model.named_parameters())
    owner = {id(p): optimizer for optimizer in step.optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, tensor in tensors.items():
        parameter_name, key = name.split("/")
        p = parameters[parameter_name]
        owner[id(p)].state[p][key] = tensor.to(p.device)
    if trainer["grad_scaler"]:  # empty if the earlier part of the run was not fp16
        step.scaler.load_state_dict(trainer["grad_scaler"])
    return Progress(**{f.name: trainer[f.name] for f in fields(Progress)})


def is_valid(tensor: torch.Tensor | None, shape: torch.Size | None) -> bool:
    return tensor is not None and tensor.shape == shape and tensor.dtype == torch.float32 and bool(tensor.isfinite().all())


def parameter_names(model: GPT) -> dict[torch.Tensor, str]:
    return {p: name for name, p in model.named_parameters()}


def remove_old(out_dir: Path, *, keep_last: int, best_step: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best one. 0 removes none."""
    folders = step_folders(out_dir)
    for step in list(folders)[:-keep_last] if keep_last else []:
        if step != best_step:
            remove_folder(folders[step])
