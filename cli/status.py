"""tritale status: how far a run is, whether its process lives, and what it logged last."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..common.console import duration
from . import options

if TYPE_CHECKING:
    from ..evaluation.run_facts import RunFacts

HELP = "print how far a running or finished run is: progress, time left, losses, memory, newest checkpoint"
WIDTH = 80  # columns
BAR = 25  # characters of the progress
LOSSES = 5  # of the last lines


def add_arguments(p: argparse.ArgumentParser) -> None:
    options.add_model(p, "run_dir", "folder of a run, such as out/quickstart")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    import json

    from ..evaluation.run_facts import RunFacts

    facts = RunFacts.read(args.run_dir)
    print(json.dumps(as_json(facts), indent=2, ensure_ascii=False) if args.json else as_text(facts))


def as_json(f: RunFacts) -> dict:
    """All that `as_text` prints. What is unknown is None. Times are in seconds."""
    start = f.starts[-1] if f.starts else {}
    validation = f.validations[-1] if f.validations else {}
    newest = max(f.checkpoints, default=None)
    return {
        "folder": str(f.folder),
        "state": f.state,
        "pid": start.get("pid"),
        "host": start.get("host"),
        "end": f.end,
        "step": f.step,
        "max_steps": f.max_steps,
        "starts": len(f.starts),
        "seconds": f.seconds,
        "seconds_left": 0.0 if f.state == "finished" else f.seconds_left,
        "losses": [line["loss"] for line in f.lines[-LOSSES:]],
        "val_step": validation.get("step"),
        "val_loss": validation.get("val_loss"),
        "val_bits_per_char": validation.get("val_bits_per_char"),
        **{name: f.last(name) for name in ("lr", "grad_norm", "tokens_per_second", "memory_gib")},
        "bad_steps": f.counted("bad_steps"),
        "spikes": f.counted("spikes"),
        "checkpoint": str(f.checkpoints[newest]) if newest is not None else None,
        "checkpoint_step": newest,
        "silent_for": round(f.silent_for, 1),
        "is_silent": f.is_silent,
    }


def as_text(f: RunFacts) -> str:
    """The status in lines of at most 80 columns, in ASCII apart from the run's own names."""
    s = as_json(f)
    free = f.device.get("free_memory")
    rows = {"state": state_line(f, s)}
    if f.max_steps:
        share = min(1.0, f.step / f.max_steps)
        done = round(BAR * share)
        rows["progress"] = f"[{'#' * done}{'.' * (BAR - done)}] {share:.1%}, step {f.step:,} of {f.max_steps:,}"
    else:
        rows["progress"] = f"step {f.step:,}"
    rows["time"] = f"{duration(s['seconds'])} of training"
    if s["seconds_left"] is not None and f.state != "finished":
        rows["time"] += f", about {duration(s['seconds_left'])} left"
    if len(f.starts) > 1:
        rows["time"] += f", {len(f.starts)} starts"
    if s["losses"]:
        rows["loss"] = " ".join(f"{loss:.3f}" for loss in s["losses"]) + f" (last {len(s['losses'])} lines)"
    if s["val_loss"] is not None:
        rows["validation"] = f"{s['val_bits_per_char']:.3f} bits per character, loss {s['val_loss']:.3f}, at step {s['val_step']:,}"
    if s["lr"] is not None:
        rows["rate"] = f"{s['lr']:.2e}" + (f", gradient norm {s['grad_norm']:.3g}" if s["grad_norm"] is not None else "")
    if s["bad_steps"] or s["spikes"]:
        rows["bad steps"] = f"{s['bad_steps']:,} skipped, {s['spikes']:,} spikes of the loss"
    if s["tokens_per_second"] is not None:
        rows["speed"] = f"{s['tokens_per_second']:,.0f} tokens/s"
    if s["memory_gib"] is not None:
        rows["memory"] = f"{s['memory_gib']:.2f} GiB at most" + (f"; {free / 2**30:.1f} GiB were free at the start" if free else "")
    rows["checkpoint"] = f.checkpoints[s["checkpoint_step"]].name if f.checkpoints else "none yet"
    return "\n".join([shortened(f"run          {f.folder}"), *(f"{name:12} {value}" for name, value in rows.items())])


def state_line(f: RunFacts, s: dict) -> str:
    """The state of the run, and what to do about it, in lines of at most 67 columns."""
    indent = "\n" + 13 * " "
    from ..training.record import FINISHED

    if f.state == "running":
        text = f"running, process {s['pid']} on {s['host']}" if s["pid"] else "running"
        text += f", last line {duration(s['silent_for'])} ago" if f.lines else ", nothing logged yet"
        return text[:67] + (f"{indent}nothing was logged for {duration(s['silent_for'])}: it may hang" if f.is_silent else "")
    if f.state == "finished":
        return "finished"
    if f.state == "failed":
        return wrapped(f"failed: {f.end}", indent)
    reason = {None: "killed: it left no message", FINISHED: "it ended before its last step"}.get(f.end, "interrupted")
    return f"stopped ({reason}){indent}run the same command again to resume"


def wrapped(text: str, indent: str) -> str:
    import textwrap

    return indent.join(textwrap.wrap(" ".join(text.split()), WIDTH - 13, max_lines=6, placeholder=" ..."))


def shortened(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[:12]} ...{line[-(WIDTH - 17) :]}"
