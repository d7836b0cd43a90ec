"""The output of a run: terminal, progress bar, metrics.jsonl and wandb."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track
from rich.table import Table
from rich.text import Text

from ..common.errors import UserError
from ..common.files import atomic_file
from .config import RunConfig, flatten


class Log:
    """Writes to the terminal, metrics.jsonl and wandb in the main process; does nothing in the others."""

    def __init__(self, config: RunConfig, *, is_main: bool):
        self.config, self.is_main = config, is_main
        self.console = Console(quiet=not is_main, highlight=False)
        self.console.soft_wrap = not self.console.is_terminal  # a terminal's lines are wrapped at spaces
        self.has_bar = self.console.is_terminal and not self.console.is_jupyter
        self._file: TextIO | None = None
        self._wandb: Any = None  # a wandb.Run

    def open(self, out_dir: Path, start_step: int) -> None:
        """Start metrics.jsonl, or continue it after `start_step` without the lines of later steps."""
        if not self.is_main:
            return
        self._path = out_dir / "metrics.jsonl"
        kept = []
        if self._path.exists():
            kept = [line for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines() if _step(line) <= start_step]
        with atomic_file(self._path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept if start_step), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
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
        """Append a line to metrics.jsonl. Raises OSError if the output folder was removed, or if the disk is full."""
        if not self._file:
            return
        self.check_folder()
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        try:
            self._file.write(json.dumps(rounded) + "\n")
        except OSError as error:
            raise OSError(
                f"{self._path} could not be written ({error}); free some space and run the same command again to resume"
            ) from None
        if self._wandb:
            self._wandb.log(rounded, step=int(values["step"]))

    def check_folder(self) -> None:
        """Raises OSError if the output folder was removed or moved since the start of the run."""
        if self._file and not (self._path.exists() and os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))):
            raise OSError(f"{self._path} was removed or replaced during the run, so the run stops; run the same command again")

    def close(self) -> None:
        if self._file:
            self.check_folder()
            os.fsync(self._file.fileno())
            self._file.close()
        if self._wandb:
            self._wandb.finish()

    def print(self, text: str = "", **options: Any) -> None:
        """Print plain text. Rich markup is off, since generated text may contain brackets."""
        self.console.print(text, markup=False, **options)

    def table(self, rows: dict[str, str]) -> None:
        """Print names and texts in two columns."""
        grid = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            grid.add_row(f"{name:15}", Text(value))
        self.console.print(grid)

    def track(self, items: Iterable, description: str) -> Iterable:
        """The items, with a progress bar, or with one line of text if the output is not a terminal."""
        if self.has_bar:
            return track(items, description=f"{description:24}", console=self.console)
        self.print(description)
        return items

    @contextmanager
    def progress(self, total: int, completed: int = 0) -> Iterator[Callable[..., None]]:
        """Yield `update(done, loss=…, speed=…)`, which moves the progress bar, or prints a line for a loss if there is no bar."""
        columns = (
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        compiling = "compiling (about a minute)"
        first = compiling if self.config.train.compile else "training"
        with Progress(*columns, console=self.console, disable=not self.has_bar, expand=True) as bar:
            task = bar.add_task(first, total=total, completed=completed)

            def update(done: int, *, loss: float | None = None, speed: float = 0.0) -> None:
                text = bar.tasks[task].description if loss is None else f"loss {loss:.3f}  {speed:,.0f} tokens/s"
                bar.update(task, completed=done, description="training" if text == compiling else text)
                if not self.has_bar and loss is not None:
                    self.print(f"step {done}/{total}  {text}")

            if not self.has_bar and completed < total:
                self.print(first)
            yield update


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):  # an incomplete line of a killed process
        return float("inf")
