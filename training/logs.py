"""The output of a run: terminal, progress bar, metrics.jsonl, samples.jsonl, run.json and the trackers."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track
from rich.table import Table
from rich.text import Text

from ..common.files import atomic_file
from . import record
from .config import RunConfig, differences
from .trackers import Trackers


class Log:
    """Writes to the terminal, the files of the output folder and the trackers in the main process; does nothing in the others."""

    def __init__(self, config: RunConfig, *, is_main: bool):
        self.config, self.is_main = config, is_main
        self.console = Console(quiet=not is_main, markup=False, highlight=False)
        self.console.soft_wrap = not self.console.is_terminal  # a terminal's lines are wrapped at spaces
        self.has_bar = self.console.is_terminal and not self.console.is_jupyter
        self.has_started = False  # whether `open` was called in the main process
        self._file: FileIO | None = None
        self._unwritten = b""  # lines that did not fit on the disk
        self._trackers: Trackers | None = None

    def open(self, out_dir: Path, start_step: int, facts: dict) -> None:
        """Start metrics.jsonl, samples.jsonl and the trackers, or continue them after `start_step` without the lines of later steps.
        `facts` go into run.json."""
        if not self.is_main:
            return
        self._path, self._samples_path = out_dir / record.METRICS, out_dir / record.SAMPLES
        logged = self.keep_until(start_step)
        before = record.read_record(out_dir).get("config")
        changed = differences(before, self.config) if isinstance(before, dict) else []
        record.write_start(out_dir, facts, step=start_step, logged=logged, changed=changed)
        self.has_started = True
        self._trackers = Trackers(self.config, out_dir, start_step, lambda text: self.print(text, style="yellow"))

    def keep_until(self, step: int) -> int:
        """Remove the lines of later steps, which the run will make again. Returns the last step that metrics.jsonl had."""
        if not self.is_main:
            return 0
        if self._file:
            self._file.close()
        logged = _keep_until(self._path, step)
        _keep_until(self._samples_path, min(step, self.config.train.max_steps - 1))  # the last samples are printed again
        self._file, self._unwritten = self._path.open("ab", buffering=0), b""
        return logged

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Write to run.json how the body ended: finished, or the error's text. Close the trackers also after an error."""
        reason = record.FINISHED
        try:
            yield
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}".strip().rstrip(":")
            raise
        finally:
            if self.has_started:
                with suppress(OSError):  # the folder was removed, or the disk is full: that is the error itself
                    record.write_end(self._path.parent, reason)
            if self._trackers:
                self._trackers.close()

    def metrics(self, **values: float) -> None:
        """Append a line to metrics.jsonl. On a full disk it is kept, and written with a later one. Raises OSError if the output folder was
        removed."""
        if not self._file:
            return
        self.check_folder()
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        was_full = bool(self._unwritten)
        self._unwritten += (json.dumps(rounded) + "\n").encode()
        if (error := self._write()) and not was_full:
            text = f"{self._path} could not be written ({error}); free some space. The run goes on and keeps the lines in memory"
            self.print(text, style="yellow")
        if self._trackers:
            self._trackers.log(rounded, int(values["step"]))

    def _write(self) -> OSError | None:
        try:
            while self._file and self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            return error

    def sample(self, **values: object) -> None:
        """Append a generated text to samples.jsonl: step, prompt, text, seed. Does nothing if that is not possible."""
        if self._file:
            with suppress(OSError), self._samples_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def check_folder(self) -> None:
        """Raises OSError if the output folder was removed or moved since the start of the run."""
        if self._file and not (self._path.exists() and os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))):
            raise OSError(f"{self._path} was removed or replaced during the run, so the run stops; run the same command again")

    def close(self) -> None:
        if self._file:
            self.check_folder()
            if error := self._write():
                raise error
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
        if self._trackers:
            self._trackers.close()

    def print(self, text: str = "", **options: Any) -> None:
        """Print plain text. Rich markup is off, since generated text may contain brackets."""
        self.console.print(text, **options)

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


def _keep_until(path: Path, step: int) -> int:
    """Remove the lines of later steps from a .jsonl file, and damaged ones. Returns the last step that the file had, 0 if it had none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.split("\n")[:-1]  # not splitlines: a sample may contain other line separators. The last line is empty or incomplete
    steps = [_step(line) for line in lines]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(line + "\n" for line, at in zip(lines, steps, strict=True) if at <= step and step), encoding="utf-8")
    return int(max((at for at in steps if at < float("inf")), default=0))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):  # an incomplete line of a killed process
        return float("inf")
