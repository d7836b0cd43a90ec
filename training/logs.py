"""What a run tells: the start-up table, the progress bar, metrics.jsonl and, where configured, wandb."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track

from ..common.errors import UserError
from ..common.files import atomic_file
from .config import RunConfig, flatten


class Log:
    """The terminal, metrics.jsonl and wandb of the main process; silent in all others."""

    def __init__(self, config: RunConfig, *, is_main: bool):
        self.config, self.is_main = config, is_main
        self.console = Console(quiet=not is_main, soft_wrap=True, highlight=False)
        self._file = self._wandb = None

    def open(self, out_dir: Path, start_step: int) -> None:
        """Begin metrics.jsonl, or go on after `start_step`: lines of later steps, from before a resume, are dropped."""
        if not self.is_main:
            return
        path = out_dir / "metrics.jsonl"
        kept = []
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= start_step]
        with atomic_file(path) as aside:
            aside.write_text("".join(line + "\n" for line in kept if start_step), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if self.config.log.wandb != "disabled":
            try:
                import wandb
            except ImportError:
                raise UserError(f"log.wandb is {self.config.log.wandb}, but wandb is not installed: pip install wandb") from None
            os.environ.setdefault("WANDB_SILENT", "true")
            known = out_dir / "wandb-run-id"  # a resumed run goes on in wandb too
            run_id = known.read_text(encoding="utf-8") if start_step and known.is_file() else None
            options = dict(project=self.config.log.project, mode=self.config.log.wandb, dir=str(out_dir), config=flatten(self.config))
            try:
                self._wandb = wandb.init(**options, id=run_id, resume="allow")
            except wandb.Error as error:
                raise UserError(f"log.wandb online did not start ({error}); run `wandb login`, or set --log.wandb offline") from None
            known.write_text(self._wandb.id, encoding="utf-8")

    def metrics(self, **values: float) -> None:
        """One line of metrics.jsonl."""
        if self.is_main:
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
        """Plain text, never read as markup: it may hold generated stories."""
        self.console.print(text, markup=False, **options)

    def table(self, rows: dict[str, str]) -> None:
        for name, value in rows.items():
            self.print(f"{name:16} {value}")

    def track(self, items: Iterable, description: str) -> Iterable:
        return track(items, description=f"{description:24}", console=self.console)

    def progress(self) -> Progress:
        """The training bar; fields of its task: loss, speed."""
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
    except (ValueError, KeyError):  # the line that a killed process was writing
        return float("inf")
