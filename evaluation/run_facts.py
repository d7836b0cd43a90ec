"""What a run's folder says about the run: metrics, samples, config, plan, device, starts, checkpoints, and whether its process lives.

`tritale status`, `report` and `doctor` read it, also while the run goes on. Nothing is written. This module does not import torch, so that
`tritale status` takes a fraction of a second.
"""

import json
import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import UserError
from ..common.files import is_locked, read_json_object
from ..common.run_folder import step_folders
from ..training.record import FINISHED, METRICS, RECORD, SAMPLES, read_record

TAIL = 20  # lines of metrics.jsonl from which the present speed is computed


@dataclass(frozen=True)
class RunFacts:
    """The facts about a run. What its folder does not say is empty or None."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)  # {"train.max_steps": 1000, …}
    plan: dict[str, Any] = field(default_factory=dict)  # "plan" of run.json, see training/record.py
    device: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, float]] = field(default_factory=list)  # of metrics.jsonl, with the training loss
    validations: list[dict[str, float]] = field(default_factory=list)
    counts: list[dict[str, float]] = field(default_factory=list)  # the lines with bad steps or spikes, also those without a loss
    samples: list[dict[str, Any]] = field(default_factory=list)  # step, prompt, text
    checkpoints: dict[int, Path] = field(default_factory=dict)
    is_running: bool = False
    silent_for: float = 0.0  # seconds since the last line of metrics.jsonl
    _columns: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, folder: Path) -> "RunFacts":
        """Raises FileNotFoundError or UserError if the folder is not a run of train.py."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; give the out_dir of a run, such as out/quickstart")
        metrics = folder / METRICS
        if not metrics.is_file() and not (folder / RECORD).is_file():
            raise UserError(f"{folder} has no {METRICS} and no {RECORD}; give the out_dir of a run, such as out/quickstart")
        record = read_record(folder)
        parts = {key: value for key in ("config", "plan", "device", "data") if isinstance(value := record.get(key), dict)}
        checkpoints = step_folders(folder)
        parts.setdefault("config", _checkpoint_config(checkpoints))  # a run of a version that wrote no run.json
        lines = [line for line in read_lines(metrics) if isinstance(line.get("step"), int)]
        starts = record.get("starts")
        return cls(
            folder,
            **parts,
            starts=[start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else [],
            lines=[line for line in lines if "loss" in line],
            validations=[line for line in lines if "val_loss" in line and "val_bits_per_char" in line],
            counts=[line for line in lines if "bad_steps" in line or "spikes" in line],
            samples=[s for s in read_lines(folder / SAMPLES) if isinstance(s.get("step"), int) and isinstance(s.get("text"), str)],
            checkpoints=checkpoints,
            is_running=is_locked(folder),
            silent_for=max(0.0, time.time() - metrics.stat().st_mtime) if metrics.is_file() else 0.0,
        )

    # ---- progress --------------------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The last logged step."""
        return max([int(line["step"]) for line in (self.lines[-1:] + self.validations[-1:])], default=0)

    @property
    def max_steps(self) -> int | None:
        return self.config.get("train.max_steps")

    @property
    def end(self) -> str | None:
        """How the last start ended: "finished", an error's text, or None while it runs, or if it was killed."""
        return None if self.is_running or not self.starts else self.starts[-1].get("end")

    @property
    def state(self) -> str:
        """running, finished, failed (an error ended it), or stopped before its last step (killed or interrupted)."""
        if self.is_running:
            return "running"
        if self.end and self.end != FINISHED and not self.end.startswith(("KeyboardInterrupt", "SystemExit")):
            return "failed"
        is_complete = self.end == FINISHED if self.max_steps is None else self.step >= self.max_steps
        return "finished" if is_complete else "stopped"

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all starts."""
        return max((line.get("seconds", 0.0) for line in (self.lines[-1:] + self.validations[-1:])), default=0.0)

    @cached_property
    def seconds_per_step(self) -> float | None:
        """Of the last lines, with validations and checkpoints; None before the second line."""
        tail = [line for line in self.lines[-TAIL:] if "seconds" in line]
        steps = tail[-1]["step"] - tail[0]["step"] if tail else 0
        return (tail[-1]["seconds"] - tail[0]["seconds"]) / steps if steps else None

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the present speed; 0 for a finished run."""
        if self.max_steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.max_steps - self.step) * self.seconds_per_step

    @property
    def planned_seconds(self) -> float:
        """Seconds of the whole run: those done and those left."""
        return self.seconds + (self.seconds_left or 0.0)

    @property
    def is_silent(self) -> bool:
        """Whether a living process has logged nothing for ten times the usual interval, and for at least five minutes."""
        if not self.is_running or self.seconds_per_step is None:
            return False
        interval = self.seconds_per_step * self.config.get("log.every", 1)
        return self.silent_for > max(300, 10 * interval)

    # ---- curves ----------------------------------------------------------------------------------------------------------------------

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a key of the training lines, where it has a finite value."""
        if name not in self._columns:
            pairs = np.array([(line["step"], line[name]) for line in self.lines if is_finite(line.get(name))], float).reshape(-1, 2)
            self._columns[name] = pairs[:, 0], pairs[:, 1]
        return self._columns[name]

    def last(self, name: str) -> float | None:
        """The last finite value of a key of the training lines."""
        return next((line[name] for line in reversed(self.lines) if is_finite(line.get(name))), None)

    def counted(self, name: str) -> int:
        """A count of the run's last line that has it: bad_steps or spikes; 0 if there were none."""
        return next((int(line[name]) for line in reversed(self.counts) if is_finite(line.get(name))), 0)

    def newest_samples(self) -> list[dict]:
        """The samples of the newest step that has any."""
        return [s for s in self.samples if s["step"] == self.samples[-1]["step"]] if self.samples else []


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a .jsonl file; [] without the file. Other lines are left out: the last one may be half written."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # a sample may contain other line separators
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                found.append(value)
    return found


def _checkpoint_config(checkpoints: dict[int, Path]) -> dict[str, Any]:
    for folder in reversed(checkpoints.values()):
        try:
            config = read_json_object(folder / "trainer" / "trainer.json", remedy="").get("config")
        except (OSError, UserError):
            continue
        if isinstance(config, dict):
            return config
    return {}
