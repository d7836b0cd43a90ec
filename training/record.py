"""run.json, the record of a run: its config, plan, device and data, and each start of train.py with the way it ended.

train.py writes it, and `tritale status`, `report` and `doctor` read it. This module does not import torch, so they start quickly.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..common.errors import UserError
from ..common.files import atomic_file, read_json_object, write_json

if TYPE_CHECKING:
    from ..data.shards import Split
    from .plan import Plan

RECORD, METRICS, SAMPLES, REPORT = "run.json", "metrics.jsonl", "samples.jsonl", "report.html"
FINISHED = "finished"
SAMPLED_TOKENS = 2_000_000  # for the entropy


def facts(planned: Plan, split: Split, config: dict[str, object]) -> dict:
    """What run.json says about a run, apart from its starts. `config` is flat: {"train.max_steps": 1000, …}."""
    import torch

    device, data = planned.device, planned.data
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return {
        "config": config,
        "plan": {
            "parameters": planned.parameters,
            "embedding": planned.embedding,
            "tokens_per_step": planned.tokens_per_step,
            "steps_per_epoch": planned.steps_per_epoch,
            "micro_batches": planned.micro_batches,
            "largest_micro_batch": planned.largest_micro_batch,
            "memory_bytes": planned.memory.total,
        },
        "device": {
            "name": device.name,
            "kind": "cpu" if device.name.startswith("CPU") else "cuda",
            "processes": device.count,
            "precision": device.precision,
            "has_bf16": device.has_bf16,
            "compiler_missing": device.compiler_missing,
            "free_memory": device.free_memory,
            "threads": torch.get_num_threads(),
            "cores": len(affinity(0)) if affinity else os.cpu_count(),
        },
        "data": {
            "source": data.source,
            "vocab_size": data.vocab_size,
            "tokens": data.tokens,
            "documents": data.documents,
            "characters": data.characters,
            "token_entropy": token_entropy(split),
        },
    }


def token_entropy(split: Split) -> float:
    """The entropy of single tokens in nats: the loss of a model that knows how frequent each token is, and nothing else."""
    counts = np.bincount(split.shards[0][:SAMPLED_TOKENS])
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def read_record(out_dir: Path) -> dict:
    """The content of run.json, or {} if it is missing or damaged: a run goes on without it."""
    with suppress(OSError, UserError):
        return read_json_object(out_dir / RECORD, remedy="")
    return {}


def write_start(out_dir: Path, facts: dict, *, step: int, logged: int, changed: list[str]) -> None:
    """Write run.json with a further start at `step`. `logged` is the last step that earlier starts logged, 0 if there is none;
    `changed` are the keys of the config that differ from the start before, as text."""
    starts = _starts(read_record(out_dir))
    starts.append(
        {"time": time.time(), "step": step, "logged": logged, "changed": changed, "pid": os.getpid(), "host": socket.gethostname()}
    )
    _write(out_dir, {**facts, "starts": starts})


def write_end(out_dir: Path, reason: str) -> None:
    """Add to the last start that the run has ended, and why: FINISHED or the text of an error."""
    record = read_record(out_dir)
    if starts := _starts(record):
        starts[-1] |= {"ended": time.time(), "end": reason}
        _write(out_dir, {**record, "starts": starts})


def _starts(record: dict) -> list[dict]:
    starts = record.get("starts")
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def _write(out_dir: Path, record: dict) -> None:
    with atomic_file(out_dir / RECORD) as temporary:
        write_json(temporary, record)
