"""Trackers of experiments: wandb, SwanLab and TensorBoard. Each is an optional package, imported when the config chooses it.

A tracker gets the same values as metrics.jsonl. A run that resumes continues the same run of the tracker where the tracker can do that.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..common.errors import UserError
from .config import RunConfig, flatten


class Tracker(Protocol):
    """Where the metrics go beside metrics.jsonl."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """https://wandb.ai. Writes to out_dir/wandb; online also to the account of `wandb login`."""

    def __init__(self, config: RunConfig, out_dir: Path, start_step: int):
        wandb = _imported("wandb", f"log.wandb is {config.log.wandb}")
        os.environ.setdefault("WANDB_SILENT", "true")
        ids = _RunId(out_dir / "wandb-run-id")
        options: dict[str, Any] = {"mode": config.log.wandb, "project": config.log.project, "config": flatten(config), "dir": str(out_dir)}
        try:
            self.run = wandb.init(**options, **ids.of_resumed(start_step), resume="allow")
        except wandb.Error as error:
            raise UserError(f"log.wandb online did not start ({error}); run `wandb login`, or set --log.wandb offline") from None
        ids.save(self.run.id)

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class SwanLab:
    """https://swanlab.cn. Writes to out_dir/swanlab; online also to the account of `swanlab login`. `swanlab sync` uploads an offline run,
    `swanlab watch` shows a local one."""

    def __init__(self, config: RunConfig, out_dir: Path, start_step: int):
        mode = config.log.swanlab
        swanlab = _imported("swanlab", f"log.swanlab is {mode}")
        if mode == "local" and not find_spec("swanboard"):
            raise UserError("log.swanlab local needs swanboard: pip install 'swanlab[dashboard]', or set --log.swanlab offline")
        folder, ids = out_dir / "swanlab", _RunId(out_dir / "swanlab-run-id")
        options: dict[str, Any] = {"mode": mode, "project": config.log.project, "config": flatten(config), "log_dir": str(folder)}
        if mode == "online":  # the other modes start a new run each time
            options |= {**ids.of_resumed(start_step), "resume": "allow"}
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = swanlab.init(name=out_dir.name, **options)
        except Exception as error:  # no login, no network: swanlab raises RuntimeError and its own types
            if mode != "online":
                raise
            raise UserError(f"log.swanlab online did not start ({error}); run `swanlab login`, or set --log.swanlab offline") from None
        ids.save(self.run.id)

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in out_dir/tensorboard: `tensorboard --logdir out`."""

    def __init__(self, config: RunConfig, out_dir: Path, start_step: int):
        _imported("tensorboard", "log.tensorboard is true")
        from torch.utils.tensorboard import SummaryWriter

        # Events of an earlier start with a step from purge_step on are hidden.
        self.writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=start_step + 1)
        rows = "\n".join(f"| {key} | {value} |" for key, value in flatten(config).items())
        self.writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", global_step=start_step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        self.writer.close()


class Trackers:
    """The trackers that the config chooses. One that fails during the run is reported once and left out, and the run goes on."""

    def __init__(self, config: RunConfig, out_dir: Path, start_step: int, warn: Callable[[str], None]):
        log, self._warn = config.log, warn
        chosen = {Wandb: log.wandb != "disabled", SwanLab: log.swanlab != "disabled", TensorBoard: log.tensorboard}
        self._trackers: list[Tracker] = [kind(config, out_dir, start_step) for kind, is_chosen in chosen.items() if is_chosen]

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the values to every tracker, without `step` among them."""
        values = {name: value for name, value in values.items() if name != "step"}
        self._each(lambda tracker: tracker.log(values, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._trackers = []

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # whatever another package raises: a run of days does not end for it
                self._trackers.remove(tracker)
                self._warn(f"{type(tracker).__name__} failed ({error}) and is left out from here on; metrics.jsonl has all values")


class _RunId:
    """The tracker's id of this run, kept in a file of the output folder."""

    def __init__(self, path: Path):
        self.path = path

    def of_resumed(self, start_step: int) -> dict[str, str]:
        return {"id": self.path.read_text(encoding="utf-8")} if start_step and self.path.is_file() else {}

    def save(self, run_id: str) -> None:
        self.path.write_text(run_id, encoding="utf-8")


def _imported(package: str, reason: str) -> Any:
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"{reason}, but {package} is not installed: pip install {package}") from None
