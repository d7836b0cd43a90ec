"""The output of a run: terminal, progress bar, metrics.jsonl and wandb."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track

from ..common.errors import UserError
from ..common.files import atomic_file
from .config import RunConfig, flatten


class Log:
    """Writes to the terminal, metrics.jsonl and wandb in the main process; does nothing in the others."""

    def __init__(self, config: RunConfig, *, is_main: bool):
        self.config, self.is_main = config, is_main
        self.console = Console(quiet=not is_main, soft_wrap=True, highlight=False)
        self._file: TextIO | None = None
        self._wandb: Any = None  # a wandb.Run

    def open(self, out_dir: Path, start_step: int) -> None:
        """Start metrics.jsonl, or continue it after `start_step` without the lines of later steps."""
        if not self.is_main:
            return
        path = out_dir / "metrics.jsonl"
        kept = []
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= start_step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept if start_step), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if self.config.log.wandb != "disabled":
            self._wandb = self._start_wandb(out_dir, is_resumed=start_step > 0)

    def _start_wandb(self, out_dir: Path, *, is_resumed: bool) -> Any:
        mode = self.config.log.wandb
        try:
            import wandb
        except ImportError:
            raise UserError(f"log.wandb is {mode}, but wandb is not installed: pip install wandb") from None
        os.environ.setdefault("WANDB_SILENT", "true")
        id_file = out_dir / "wandb-run-id"  # a resumed run continues the same wandb run
        options: dict[str, Any] = {"mode": mode, "project": self.config.log.project, "config": flatten(self.config), "dir": str(out_dir)}
        if is_resumed and id_file.is_file():
            options["id"] = id_file.read_text(encoding="utf-8")
        try:
            run = wandb.init(**options, resume="allow")
        except wandb.Error as error:
            raise UserError(f"log.wandb online did not start ({error}); run `wandb login`, or set --log.wandb offline") from None
        id_file.write_text(run.id, encoding="utf-8")
        return run

    def metrics(self, **values: float) -> None:
        """Append a line to metrics.jsonl."""
        if self._file:
            rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
            self._file.write(json.dumps(rounded) + "\n")
            if self._wandb:
                self._wandb.log(rounded, step=int(values["step"]))

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._wandb:
            self._wandb.finish()

    def print(self, text: str = "", **options) -> None:
        """Print plain text. Rich markup is off, since generated text may contain brackets."""
        self.console.print(text, markup=False, **options)

    def table(self, rows: dict[str, str]) -> None:
        for name, value in rows.items():
            self.print(f"{name:16} {value}")

    def track(self, items: Iterable, description: str) -> Iterable:
        return track(items, description=f"{description:24}", console=self.console)

    def progress(self) -> Progress:
        """The progress bar of training. Its task has the fields loss and speed."""
        return Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # an incomplete line of a killed process
        return float("inf")
