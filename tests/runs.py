"""Tiny runs of train.py for the tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = {
    "data.stories": 60,
    "data.validation_stories": 8,
    "data.vocab_size": 600,
    "model.preset": "tiny",
    "train.max_steps": 6,
    "train.global_batch": 4,
    "train.micro_batch": 2,
    "train.validate_every": 3,
    "train.sample_every": 0,
    "train.checkpoint_every": 3,
    "train.compile": "false",
    "train.precision": "fp32",  # the same on every CPU
    "optim.warmup_steps": 2,
    "log.every": 1,
    "log.sample_tokens": 20,
}


def command(out_dir: Path, **options) -> list[str]:
    """The command line of train.py with the tiny config; data__stories=10 means --data.stories 10."""
    options = TINY | {"out_dir": out_dir} | {k.replace("__", "."): v for k, v in options.items()}
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return [str(REPOSITORY / "train.py"), *flags]


def train(out_dir: Path, *, processes: int = 0, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run train.py in a new process, or in several. Asserts success if `check`."""
    script, *flags = command(out_dir, **options)
    program = ["-m", "tritale", "train", f"--processes={processes}"] if processes else [script]
    result = subprocess.run([sys.executable, *program, *flags], capture_output=True, text=True, encoding="utf-8", cwd=REPOSITORY)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def run_here(out_dir: Path, **options) -> None:
    """train.py's main in this process: faster, and it raises its exceptions."""
    from train import main  # imports torch, which conftest.py configures first
    from tritale.training import processes
    from tritale.training.config import parse

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "keep_heap", lambda: None)  # changes the whole process
        main(parse(command(out_dir, **options)[1:]))


def metrics(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(out_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(out_dir) if "loss" in line}
