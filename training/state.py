"""Checkpoints of a run: out_dir/step-00001000/ is a Hugging Face model, and trainer/ inside holds what the loop needs to go on.

Only safetensors and JSON. The data needs no state: its order is a function of the step.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..common.errors import UserError
from ..common.files import atomic_folder, remove_folder, write_json
from ..data.tokenizer import Tokenizer
from ..model.checkpoint import load_tensors, load_weights, read_json, save_model
from ..model.gpt import GPT
from ..model.run_folder import step_folder, step_folders
from .config import RunConfig, differences, flatten


def newest_whole(out_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files can all be opened; `warn` is told of each newer one that is damaged, and it stays as it is."""
    for folder in reversed(step_folders(out_dir).values()):
        try:
            for name in ("config.json", "trainer/trainer.json"):
                read_json(folder, name)
            for name in ("model.safetensors", "trainer/state.safetensors"):
                with safe_open(folder / name, "pt"):  # reads the header, and holds it against the size of the file
                    pass
            return folder
        except (OSError, ValueError, SafetensorError) as error:
            warn(f"{folder} is damaged ({error}); an earlier checkpoint is used")
    return None


def remove_leftovers(out_dir: Path) -> None:
    """Remove what a killed process was writing or removing."""
    for path in out_dir.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def save(
    out_dir: Path,
    config: RunConfig,
    step: int,
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    tokenizer: Tokenizer,
    progress: dict,
) -> Path:
    """Write out_dir/step-…: the model, its tokenizer, the optimizers' state, random state, config and `progress` (JSON).

    Raises OSError that names the folder where the disk is full; what was there before stays whole."""
    folder = step_folder(out_dir, step)
    names = {p: name for name, p in model.named_parameters()}
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"{names[p]}/{key}": value for key, value in state.items()}
    try:
        with atomic_folder(folder) as temporary:
            save_model(temporary, model, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
            tokenizer.save(temporary)
            (temporary / "trainer").mkdir()
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / "trainer" / "state.safetensors")
            trainer = {"step": step, "config": flatten(config), "grad_scaler": scaler.state_dict(), **progress}
            write_json(temporary / "trainer" / "trainer.json", trainer)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the checkpoint {folder} could not be written ({error}); earlier checkpoints are whole: free some space, or set "
            "--train.keep_last, and run the same command again to go on"
        ) from error
    return folder


def check_config(folder: Path, config: RunConfig) -> None:
    """Raises ValueError where the checkpoint's run had another config; with resume "force" only where its weights or its optimizer
    cannot serve this one, or it is already beyond the last step."""
    trainer = read_json(folder / "trainer", "trainer.json")
    changed = differences(trainer["config"], config)
    needed = [c for c in changed if c.startswith(("data.", "model.", "seed", "optim.matrices"))]
    if needed and config.resume == "force":
        raise UserError(f"{folder.parent} cannot go on with {'; '.join(needed)}: choose another --out_dir, or take the old values")
    if trainer["step"] > config.train.max_steps:
        raise UserError(
            f"{folder} is beyond train.max_steps ({config.train.max_steps}); set that to at least {trainer['step']}, "
            "or choose another --out_dir"
        )
    if changed and config.resume != "force":
        raise UserError(
            f"{folder.parent} holds a run with another config: {'; '.join(changed)}. Choose another --out_dir, take the old values, "
            "or go on with the new ones with --resume force"
        )


def load(folder: Path, model: GPT, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> dict:
    """Put a checkpoint's weights, optimizer and random state in place; returns trainer.json.

    Raises FileNotFoundError where a file is missing, ValueError where one is damaged."""
    trainer = read_json(folder / "trainer", "trainer.json")
    load_weights(model, folder)
    tensors = load_tensors(folder / "trainer", "state.safetensors")
    torch.set_rng_state(tensors.pop("rng.cpu"))
    rng = tensors.pop("rng.cuda", None)
    if rng is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng)
    parameters = dict(model.named_parameters())
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, tensor in tensors.items():
        parameter_name, key = name.split("/")
        p = parameters[parameter_name]
        owner[id(p)].state[p][key] = tensor.to(p.device)
    scaler.load_state_dict(trainer["grad_scaler"])
    return trainer


def remove_old(out_dir: Path, *, keep_last: int, best_step: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints (0: none is removed) and the best one."""
    folders = step_folders(out_dir)
    for step in list(folders)[:-keep_last] if keep_last else []:
        if step != best_step:
            remove_folder(folders[step])
