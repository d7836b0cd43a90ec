"""Checkpoints of a run. out_dir/step-00001000/ is a Hugging Face model; its folder trainer/ holds what a resumed run needs.

Only safetensors and JSON. The data needs no state: its order is a function of the step.
"""

import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open

from ..common.errors import UserError
from ..common.files import atomic_folder, final_name, remove_folder, write_json
from ..common.run_folder import step_folder, step_folders, weights_of
from ..data.tokenizer import Tokenizer
from ..model import checkpoint
from ..model.checkpoint import (
    CHECKSUMS,
    EMA,
    WEIGHTS,
    check_files,
    hf_state,
    load_adapter,
    load_tensors,
    load_weights,
    read_json,
    read_shape,
    save_tensors,
)
from ..model.lora import adapter_state
from . import processes
from .config import RunConfig, differences, flatten
from .health import Health
from .plan import size
from .preference import STATISTICS
from .step import TrainingStep

T = TypeVar("T")
FORMAT = 1  # of trainer/; files without a number have format 1
NO_PREFERENCE = [0.0] * (len(STATISTICS) + 1)


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # optimizer steps done
    best_step: int | None = None  # the checkpoint with the lowest validation loss
    best_loss: float | None = None  # its validation loss
    seconds: float = 0.0  # of training, over all starts of the run
    passed: list[list[int]] = field(default_factory=list)  # [first, number] of the steps of the data that bad steps made the run pass over

    def batch(self, step: int) -> int:
        """The step of the data that a 0-based optimizer step trains on."""
        for first, n in self.passed:
            step += n if step >= first else 0
        return step

    def pass_over(self, first: int, last: int) -> None:
        """Leave out the batches of the optimizer steps first … last."""
        first, last = self.batch(first), self.batch(last)
        outside = [part for part in self.passed if not first <= part[0] <= last]
        self.passed = sorted([*outside, [first, last - first + 1]])


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
            for name in (weights_of(folder).name, "trainer/state.safetensors"):
                with safe_open(folder / name, "pt"):  # reads the header and compares it with the file's size
                    pass
            return folder
        except (OSError, UserError, SafetensorError) as error:
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
    passed, health = trainer.get("passed", []), trainer.get("health", {})  # earlier versions wrote neither
    if not isinstance(passed, list) or not all(isinstance(p, list) and list(map(type, p)) == [int, int] for p in passed):
        wrong.append("passed")
    lists = ("losses", "reports")
    if not isinstance(health, dict) or not all(isinstance(v, list if key in lists else number) for key, v in health.items()):
        wrong.append("health")
    preference = trainer.get("preference", NO_PREFERENCE)
    if not isinstance(preference, list) or len(preference) != len(NO_PREFERENCE) or not all(isinstance(v, number) for v in preference):
        wrong.append("preference")
    if wrong and trainer.get("format", 1) == FORMAT:
        raise UserError(f"{folder}/trainer/trainer.json: {', '.join(wrong)} missing or of a wrong type")


def remove_leftovers(out_dir: Path) -> None:
    """Remove the temporary folders of a killed process."""
    for path in out_dir.glob(".step-*"):
        if final_name(path):
            shutil.rmtree(path, ignore_errors=True)


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in the main memory, which a training step does not change."""
    return {name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()}


class Saver:
    """Writes checkpoints out_dir/step-… in a background thread: the model, its tokenizer, the optimizers' state, the random state, the
    config and the progress. Only the main process has one.

    A checkpoint that cannot be written (a full disk) is reported, and earlier ones stay complete. The next `save` tries again."""

    def __init__(self, step: TrainingStep, tokenizer: Tokenizer, *, report: Callable[[str], None], after: Callable[[], object]):
        """`after` is called in the background after each checkpoint that was written."""
        self._step, self._tokenizer, self._report, self._after = step, tokenizer, report, after
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # of the last checkpoint

    def save(self, progress: Progress) -> None:
        """Copy the state to the main memory and start writing it, after the checkpoint before is written. All processes call this; only the
        main one writes."""
        self.close()
        if self._error and not isinstance(self._error, OSError):
            raise self._error
        step, folder = self._step, step_folder(Path(self._step.config.out_dir), progress.step)
        device, is_main = torch.device("cpu") if step.shards else step.here.device, step.here.is_main
        tensors = {"rng.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        for optimizer in step.optimizers:
            for p, state in optimizer.state.items():
                for key, value in state.items():
                    if step.shards and key != "step":
                        value = step.shards.whole(value, p).to("cpu")
                    if is_main:
                        tensors[f"{step.names[p]}/{key}"] = value
        weights = {WEIGHTS: adapter_state(step.model) if step.base else hf_state(step.whole_model(device=device))}
        if step.averages:
            weights[EMA] = hf_state(step.whole_model(ema=True, device=device))
        step.count()
        preference = processes.total(step.preference.clone()).tolist()
        if not is_main:
            return
        trainer = {"format": FORMAT, "config": flatten(step.config), "grad_scaler": step.scaler.state_dict(), **asdict(progress)}
        trainer |= {"health": asdict(step.health), "preference": preference}
        weights = {name: copied(state) for name, state in weights.items()}
        arguments = folder, weights, copied(tensors), trainer
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()

    def close(self) -> None:
        """Wait until the last checkpoint is written, or has failed."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises OSError that names the folder if it could not be written."""
        self.close()
        if self._error:
            raise self._error

    def _write(self, folder: Path, weights: dict[str, dict[str, torch.Tensor]], state: dict[str, torch.Tensor], trainer: dict) -> None:
        self._error = None
        tokenizer, model, config = self._tokenizer, self._step.model, self._step.config.train
        needed = sum(t.nbytes for tensors in (*weights.values(), state) for t in tensors.values())
        try:
            with atomic_folder(folder) as temporary:
                checkpoint.save_model(temporary, model, **tokenizer.special_ids, state=weights[WEIGHTS], base=self._step.base)
                if EMA in weights:
                    save_tensors(temporary / EMA, weights[EMA])
                tokenizer.save(temporary, context=model.config.context)
                (temporary / "trainer").mkdir()
                save_tensors(temporary / "trainer" / "state.safetensors", state)
                write_json(temporary / "trainer" / "trainer.json", trainer)
                for path in (temporary, temporary / "trainer"):
                    checkpoint.write_checksums(path)
        except (OSError, SafetensorError) as error:
            text = (
                f"the checkpoint {folder} could not be written ({error}); earlier checkpoints are complete. It needs about {size(needed)}"
            )
            self._error = OSError(f"{text}: free some space, and run the same command again to resume")
            if trainer["step"] < config.max_steps:
                self._report(f"{text}: free some space. The run goes on, and the next checkpoint tries again")
        except Exception as error:
            self._error = error
        else:
            best_step = trainer["best_step"] if config.keep_best else None
            with suppress(OSError):
                remove_old(folder.parent, newest=trainer["step"], keep_last=config.keep_last, best_step=best_step)
            self._after()


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
    needed = [c for c in changed if c.startswith(("data.", "model.", "lora.", "seed", "init_from", "optim.matrices"))]
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
    read_shape(folder)  # refuses a newer format
    if step.base:
        step.base = load_adapter(step.model, folder)  # not init_from's: that run may have gone on
    for ema in () if step.base else (False, True) if step.averages else (False,):
        model = step.whole_model(ema=ema, device=torch.device("cpu"))
        has_ema = ema and (folder / EMA).is_file()  # an earlier part of the run may have had none
        load_weights(model, folder, name=EMA if has_ema else WEIGHTS)
        step.set_weights(model, ema=ema)
    tensors = load_tensors(folder / "trainer", "state.safetensors")
    rng, rng_cuda = tensors.pop("rng.cpu", None), tensors.pop("rng.cuda", None)
    shapes = step.state_shapes
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
    parameters = {name: p for p, name in step.names.items()}
    owner = {id(p): optimizer for optimizer in step.optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, tensor in tensors.items():
        parameter_name, key = name.split("/")
        p = parameters[parameter_name]
        state = owner[id(p)].state[p]
        if step.shards and key != "step":
            tensor = step.shards.part(tensor, p)
        if key in state:  # in place, since a CUDA graph of the step uses this memory
            state[key].copy_(tensor)
        else:
            state[key] = tensor.to(p.device)
    if trainer["grad_scaler"]:  # empty if the earlier part of the run was not fp16
        step.scaler.load_state_dict(trainer["grad_scaler"])
    preference = trainer.get("preference", NO_PREFERENCE) if step.here.is_main else NO_PREFERENCE  # the sums of all processes
    step.preference.copy_(torch.tensor(preference))
    step.health = known(Health, {"steps": trainer["step"], **trainer.get("health", {})})
    return known(Progress, trainer)


def known(kind: type[T], values: dict) -> T:
    """A dataclass from the values that it has; the others keep their defaults. Earlier versions wrote fewer."""
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})  # pyright: ignore[reportArgumentType]


def go_back(out_dir: Path, step: TrainingStep, progress: Progress, done: int, tried: Path | None, warn: Callable[[str], None]) -> Path:
    """Load the newest checkpoint into `step` and `progress` after bad steps, the last of which is `done`, and pass over their batches.

    Returns the checkpoint. Raises FloatingPointError if there is none, or if it is `tried`, to which the run has already gone back."""
    bad, newest = step.health.bad_in_row, newest_complete(out_dir, warn)
    reason = f"the loss or the gradient was not finite in the last {bad} steps, none of which changed the weights"
    if newest is None or newest == tried:
        more = "there is no checkpoint to go back to" if newest is None else f"{newest} was already gone back to"
        raise step.diverged(done, f"{reason}; {more}")
    progress.pass_over(done - bad, done - 1)
    loaded = load(newest, step)
    step.health.bad_steps += bad
    warn(f"step {done}: {reason}. Back to {newest}; the run passes over their batches")
    progress.step, progress.best_step, progress.best_loss = loaded.step, loaded.best_step, loaded.best_loss
    return newest


def is_valid(tensor: torch.Tensor | None, shape: torch.Size | None) -> bool:
    return tensor is not None and tensor.shape == shape and tensor.dtype == torch.float32 and bool(tensor.isfinite().all())


def remove_old(out_dir: Path, *, newest: int, keep_last: int, best_step: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints up to step `newest`, which is complete, and the best one. 0 removes none.

    Later steps are those of a damaged checkpoint that the run did not resume from."""
    folders = {step: folder for step, folder in step_folders(out_dir).items() if step <= newest}
    for step in list(folders)[:-keep_last] if keep_last else []:
        if step != best_step:
            remove_folder(folders[step])
