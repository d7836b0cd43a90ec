"""tritale average: one checkpoint with the mean of the last ones' weights."""

import argparse
from pathlib import Path

from . import options

HELP = "average the weights of a run's last checkpoints"


def add_arguments(p: argparse.ArgumentParser) -> None:
    options.add_model(p, "run_dir", "folder of a run, such as out/quickstart; average-… is written there")
    p.add_argument("--last", type=int, default=5, metavar="N", help="number of the newest checkpoints")
    p.add_argument("--validation-documents", type=int, default=1000, metavar="N", help="held-out documents, evenly spread, to validate on")
    p.add_argument("--data", type=Path, default=None, metavar="DIR", help="the run's data, if it was moved")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from ..evaluation.average import average
    from ..evaluation.trained_run import TrainedRun

    console = Console(markup=False)
    trained = TrainedRun.open(args.run_dir)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("averaging", total=None)
        advance = lambda total: bar.update(task, total=total, advance=1)
        out, about = average(trained, last=args.last, validation_documents=args.validation_documents, data=args.data, advance=advance)
    steps, validation = about["steps"], about["validation"]
    console.print(
        f"{out}: the mean of steps {', '.join(map(str, steps))}\n"
        f"Validation on {validation['documents']:,} of {validation['of_documents']:,} held-out documents, in bits per character:\n"
        f"{about['val_bits_per_char']:.4f} (the last checkpoint, step {steps[-1]}: {about['last']['val_bits_per_char']:.4f})",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
