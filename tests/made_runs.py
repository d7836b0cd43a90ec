"""Runs whose metrics the real Log writes from given curves, for what takes hours or a GPU to happen."""

import math
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from runs import command

from tritale.training.config import RunConfig, flatten, parse
from tritale.training.logs import Log
from tritale.training.optimizer import lr_factor

# A run of 13.9 M parameters on one GPU.
FACTS: dict[str, dict[str, Any]] = {
    "plan": {
        "parameters": 13_900_000, "embedding": 3_276_800, "tokens_per_step": 262_144, "steps_per_epoch": 2500, "micro_batches": 16,
        "largest_micro_batch": 128, "memory_bytes": 2_000_000_000,
    },
    "device": {
        "name": "NVIDIA GeForce RTX 3090 Ti", "kind": "cuda", "processes": 1, "precision": "bf16", "has_bf16": True,
        "compiler_missing": None, "free_memory": 24 * 2**30, "threads": 8, "cores": 16,
    },
    "data": {
        "source": "out/tinystories-zh/train", "vocab_size": 6400, "tokens": 640_000_000, "documents": 3_900_000,
        "characters": 1_000_000_000, "token_entropy": 6.1,
    },
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "train__max_steps": 20_000, "train__compile": "true", "train__precision": "auto", "optim__schedule": "cosine", "optim__lr": 5e-4,
    "optim__embedding_lr": "null", "optim__warmup_steps": 1000, "train__checkpoint_every": 1000, "train__validate_every": 2000,
    "data__source": "out/tinystories-zh", "log__every": 50,
}  # fmt: skip


def usual_loss(step: int) -> float:
    """A loss that falls from 8.8 to 1.5 like those of the series and of the quick start."""
    return 1.3 + 7.5 * (1 + step / 60) ** -0.65


def made_run(
    out_dir: Path,
    *,
    start: int = 0,
    until: int | None = None,  # the last step, train.max_steps if not given
    end: BaseException | str = "finished",  # or an error, or "killed"
    loss: Callable[[int], float] = usual_loss,
    val_loss: Callable[[int], float] | None = None,
    facts: dict[str, dict] | None = None,  # changes to FACTS
    samples: tuple[str, ...] = (),
    seconds: float = 2.0,  # per step
    seed: int = 0,
    columns: dict[str, Callable[[int], float]] | None = None,  # other values of a line
    **options,
) -> Path:
    """Write metrics.jsonl, samples.jsonl and run.json of one start of a run."""
    config: RunConfig = parse(command(out_dir, **(OPTIONS | options))[1:])
    whole: dict[str, Any] = deepcopy(FACTS) | {"config": flatten(config)}
    for part, changes in (facts or {}).items():
        whole[part] |= changes
    rng, log, max_steps = random.Random(seed + start), Log(config, is_main=True), config.train.max_steps
    tokens = whole["plan"]["tokens_per_step"]
    out_dir.mkdir(exist_ok=True)

    def write() -> None:
        log.open(out_dir, start, whole)
        for step in range(start + 1, (until or max_steps) + 1):
            if step % config.log.every == 0 or step == max_steps:
                line = {
                    "loss": loss(step) * (1 + 0.01 * rng.gauss(0, 1)),
                    "lr": config.optim.lr * lr_factor(step - 1, max_steps, config.optim),
                    "grad_norm": 0.4 * math.exp(0.2 * rng.gauss(0, 1)),
                    "tokens_per_second": tokens / seconds * (1 + 0.02 * rng.gauss(0, 1)),
                    "memory_gib": 2.31,
                    "data_share": 0.01,
                    "seconds": seconds * step,
                }
                line |= {name: value(step) for name, value in (columns or {}).items()}
                log.metrics(step=step, tokens=step * tokens, **line)
            if step % config.train.validate_every == 0 or step == max_steps:
                value = (val_loss or loss)(step)
                log.metrics(step=step, val_loss=value, val_bits_per_char=value / 1.1, seconds=seconds * step)
        for text in samples:
            log.sample(step=until or max_steps, prompt="从前，", text=text, seed=1)
        log.close()
        if isinstance(end, BaseException):
            raise end

    if end == "killed":
        write()
        return out_dir
    try:
        with log.recorded():
            write()
    except BaseException as error:
        if error is not end:
            raise
    return out_dir
