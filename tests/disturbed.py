"""Runs that are killed and stopped at random moments: python -m tests.disturbed --signal KILL --number 50 [--processes 2]

The run is started again after each signal. Half of the signals come while a checkpoint is being written. At the end its losses, weights
and optimizer state must be those of an undisturbed run; after each signal every checkpoint must be whole, and no step may be logged twice.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

from runs import command, losses, metrics  # noqa: E402

STEPS = 10  # of a run, for each signal
OPTIONS = {
    "train__validate_every": 50, "train__checkpoint_every": 4, "train__keep_last": 3, "log__every": 2, "train__ema": 0.9,
    "model__n_layer": 1, "train__global_batch": 2, "train__micro_batch": 1,
}  # fmt: skip


def start(out_dir: Path, processes: int, **options) -> subprocess.Popen:
    script, *flags = command(out_dir, **OPTIONS | options)
    program = ["-m", "tritale", "train", f"--processes={processes}"] if processes > 1 else [script]
    return subprocess.Popen(
        [sys.executable, *program, *flags], cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        encoding="utf-8", start_new_session=True,
    )  # fmt: skip


def logged(out_dir: Path) -> list[dict]:
    """The complete lines of metrics.jsonl."""
    path = out_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def wait_for_moment(run: subprocess.Popen, out_dir: Path, in_save: bool) -> None:
    """Wait until the run has made some steps more than its newest checkpoint has, and for a random time; or then until it writes a
    checkpoint, and for a part of that."""
    newest = max((int(path.name[5:]) for path in out_dir.glob("step-*")), default=0)
    target, deadline = newest + random.randint(1, STEPS), time.time() + 200
    while run.poll() is None and max((line["step"] for line in logged(out_dir)), default=0) < target and time.time() < deadline:
        time.sleep(0.01)
    while in_save and run.poll() is None and not list(out_dir.glob(".step-*.tmp")) and time.time() < deadline:
        time.sleep(0.0005)
    time.sleep(random.uniform(0, 0.01 if in_save else 0.05))


def check_files(out_dir: Path) -> None:
    """Every checkpoint is whole, and no step is logged twice."""
    from tritale.model.checkpoint import check_files

    for folder in out_dir.glob("step-*"):
        for path in (folder, folder / "trainer"):
            assert (path / "checksums.json").is_file(), path
            check_files(path)
    steps = Counter((line["step"], "loss" in line) for line in logged(out_dir))
    assert max(steps.values(), default=1) == 1, steps.most_common(3)


def state(out_dir: Path, step: int) -> dict:
    folder = out_dir / f"step-{step:08d}"
    names = ("model.safetensors", "ema.safetensors", "trainer/state.safetensors")
    return {(name, key): tensor for name in names for key, tensor in load_file(folder / name).items()}


def disturbed(folder: Path, sent: signal.Signals, number: int, processes: int = 1) -> tuple[int, int]:
    """Send `number` signals to a run, and compare it with one without. Returns how many signals came within the training, and how many of
    them while a checkpoint was being written."""
    steps = STEPS * number
    undisturbed, out_dir = folder / "undisturbed", folder / "disturbed"
    reference = start(undisturbed, processes, train__max_steps=steps)
    assert reference.wait() == 0, reference.communicate()[1]
    within = in_saves = 0
    for n in range(number):
        run = start(out_dir, processes, train__max_steps=steps)
        wait_for_moment(run, out_dir, in_save=n % 2 == 1)
        in_saves += bool(list(out_dir.glob(".step-*.tmp")))
        within += run.poll() is None
        if sent is signal.SIGKILL:
            victim = run.pid
            if processes > 1 and (ranks := children(run.pid)):
                victim = random.choice([run.pid, *ranks])  # the launcher or a rank
            os.kill(victim, sent)
            run.wait()
            wait_until_free(out_dir)
        else:
            os.kill(run.pid, sent)
            message = run.communicate()[1]
            assert run.returncode in (0, 128 + sent if sent is signal.SIGINT else 0), message
            assert "is written; run the same command again to go on" in message or list(out_dir.glob(f"step-{steps:08d}")), message
            assert not list(out_dir.glob(".step-*"))
        check_files(out_dir)
    last = start(out_dir, processes, train__max_steps=steps)
    message = last.communicate()[1]
    assert last.returncode == 0, message
    check_files(out_dir)
    assert losses(out_dir) == losses(undisturbed)
    assert [line["step"] for line in metrics(out_dir)] == [line["step"] for line in metrics(undisturbed)]
    ours, theirs = state(out_dir, steps), state(undisturbed, steps)
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)
    assert not list(out_dir.glob(".step-*"))
    return within, in_saves


def children(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def wait_until_free(out_dir: Path) -> None:
    """The ranks of a killed launcher end a moment later."""
    from tritale.common.files import is_locked

    deadline = time.time() + 60
    while is_locked(out_dir) and time.time() < deadline:
        time.sleep(0.05)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="runs that are killed and stopped at random moments")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--number", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.randrange(2**32)
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        sent = signal.Signals[f"SIG{args.signal}"]
        within, in_saves = disturbed(Path(folder), sent, args.number, args.processes)
    done = f"{args.number} × SIG{args.signal}, {args.processes} process(es): {within} during a run, {in_saves} in a save"
    print(f"seed {seed}: {done}; losses, weights, EMA and optimizer state are those of the undisturbed run")
    print("after each signal every checkpoint was whole, and no step was logged twice")
