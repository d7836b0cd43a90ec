"""tritale lr-find: a learning-rate range test."""

import argparse

from ..common.errors import UserError

HELP = "train on the run's data with a rising learning rate, draw the loss, and suggest a rate"
TAKES_CONFIG = True


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--config", default=None, metavar="FILE", help="YAML file; configs/quickstart.yaml if not given")
    p.add_argument("--steps", type=int, default=120, help="optimizer steps of the test")
    p.add_argument("--lowest", type=float, default=1e-5, help="optim.lr of the first step")
    p.add_argument("--highest", type=float, default=1.0, help="optim.lr of the last step")
    p.add_argument("--out", default=None, metavar="PNG", help="file of the curve; out_dir/lr-find.png if not given")
    p.epilog = "Keys of the config are set as for train.py: --optim.matrices adamw …"


def run(args: argparse.Namespace) -> None:
    import time
    from importlib.util import find_spec
    from pathlib import Path

    from ..common.files import locked
    from ..data.batches import Batches
    from ..data.built_in import open_data, write_built_in
    from ..training import processes
    from ..training.config import at_least, parse
    from ..training.logs import Log
    from ..training.lr_find import analyze, draw, sweep
    from ..training.plan import DataFacts, DeviceFacts, plan
    from ..training.step import TrainingStep, explain_errors

    at_least("--steps", args.steps, 20)
    if not 0 < args.lowest < args.highest < float("inf"):
        raise UserError(
            f"--lowest is {args.lowest} and --highest {args.highest}; both must be finite and above 0, and --highest above --lowest"
        )
    if not find_spec("matplotlib"):  # before the work, not after
        raise UserError("the curve needs matplotlib: pip install matplotlib")
    config = parse(args.overrides, file=args.config, prog="tritale lr-find")
    train, log, here = config.train, Log(config, is_main=True), processes.start()
    if config.data.source == "built-in":
        with locked(Path(config.out_dir), "a training process"):
            write_built_in(config.data_folder, seed=config.seed, **config.data.built_in, track=log.track)
    _, split, _ = open_data(config.data_folder)
    planned = plan(config, DataFacts.of(split), DeviceFacts.of(here, config))
    sizes = {"context": planned.sequence, "micro_batch": train.micro_batch, "global_batch": train.global_batch}
    batches = Batches(split, **sizes, seed=config.seed, document_mask=config.data.document_mask)

    rates, losses = [], []
    with explain_errors(config), log.progress(args.steps) as update:
        step, start = TrainingStep(planned, here), time.perf_counter()
        for rate, loss in sweep(step, batches, lowest=args.lowest, highest=args.highest, steps=args.steps):
            rates.append(rate)
            losses.append(loss)
            speed = len(rates) * planned.tokens_per_step / (time.perf_counter() - start)
            update(len(rates), loss=loss if len(rates) % config.log.every == 0 else None, speed=speed)
    if not rates:
        raise UserError("the first loss is not finite; check the data, or lower model.init_std")
    found = analyze(rates, losses)
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
            "configured": f"{config.optim.lr:.1e}",
            "suggestion": keys,
            "curve": str(path),
        }
    )
