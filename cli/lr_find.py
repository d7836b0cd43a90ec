"""tritale lr-find: a learning-rate range test."""

import argparse

from ..common.errors import UserError

HELP = "raise the learning rate step by step on the run's own data, draw the loss, and suggest a rate"
TAKES_CONFIG = True


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--config", default=None, metavar="FILE", help="YAML file; the quick start's where not given")
    p.add_argument("--steps", type=int, default=120, help="optimizer steps of the test")
    p.add_argument("--lowest", type=float, default=1e-5, help="optim.lr of the first step")
    p.add_argument("--highest", type=float, default=1.0, help="optim.lr of the last step")
    p.add_argument("--out", default=None, metavar="PNG", help="the curve; out_dir/lr-find.png where not given")
    p.epilog = "Keys of the config can be changed as for train.py: --optim.matrices adamw …"


def run(args: argparse.Namespace) -> None:
    from dataclasses import replace
    from importlib.util import find_spec
    from pathlib import Path

    from ..data.batches import Batches
    from ..data.built_in import open_data, write_built_in
    from ..training import processes
    from ..training.config import at_least, parse
    from ..training.logs import Log
    from ..training.lr_find import draw, find, sweep
    from ..training.plan import DataFacts, DeviceFacts, plan
    from ..training.step import Trial

    at_least("--steps", args.steps, 20)
    if not 0 < args.lowest < args.highest:
        raise UserError(f"--lowest is {args.lowest} and --highest {args.highest}; both must be above 0, the second above the first")
    if not find_spec("matplotlib"):  # before the work, not after
        raise UserError("the curve needs matplotlib: pip install 'tritale[plots]'")
    config = parse([*(["--config", args.config] if args.config else []), *args.overrides], prog="tritale lr-find")
    log = Log(config, is_main=True)
    here = replace(processes.start(), rank=0, world_size=1)
    if config.data.source == "built-in":
        write_built_in(config.data_folder, seed=config.seed, **config.data.built_in, track=log.track)
    _, split, _ = open_data(config.data_folder)
    planned = plan(config, DataFacts.of(split), DeviceFacts.of(here, config))
    sizes = dict(context=planned.sequence, micro_batch=config.train.micro_batch, global_batch=config.train.global_batch)
    batches = Batches(split, **sizes, seed=config.seed, document_mask=config.data.document_mask)

    curve = []
    with log.progress() as bar:
        task = bar.add_task("", total=args.steps, loss=float("nan"), speed=0.0)
        rising = dict(peak_lr=config.optim.lr, lowest=args.lowest, highest=args.highest, steps=args.steps)
        for rate, loss in sweep(Trial(planned, here.device), batches, **rising):
            curve.append((rate, loss))
            elapsed = bar.tasks[task].elapsed or 0
            bar.update(task, completed=len(curve), loss=loss, speed=len(curve) * batches.tokens_per_step / elapsed if elapsed else 0)
    if not curve:
        raise UserError("the first loss is not finite; look at the data, or lower model.init_std")
    found = find(*map(list, zip(*curve, strict=True)))
    path = Path(args.out or Path(config.out_dir) / "lr-find.png")
    draw(found, path, configured=config.optim.lr)
    keys = f"--optim.lr {found.suggestion:g}"
    if config.optim.embedding_lr:
        keys += f" --optim.embedding_lr {found.suggestion * config.optim.embedding_lr / config.optim.lr:.2g}"
    log.table(
        {
            "first loss": f"{found.losses[0]:.3f}",
            "steepest": f"at {found.steepest:.1e}",
            "lowest loss": f"{found.smoothed.min():.3f} at {found.lowest:.1e}",
            "as configured": f"{config.optim.lr:.1e}",
            "suggestion": keys,
            "curve": str(path),
        }
    )
