"""tritale sweep: compare the stories of a run's checkpoints."""

import argparse
import sys
from pathlib import Path

from ..common.console import progress_bar, wrapped
from ..common.errors import UserError
from . import options

HELP = "compare the stories of a run's checkpoints: repetition, endings, consistency, copying"


def add_arguments(p: argparse.ArgumentParser) -> None:
    options.add_model(p, "run_dir", "folder of a run, such as out/quickstart; sweep.json and sweep.html are written there")
    p.add_argument("--every", type=int, default=1, metavar="N", help="measure each N-th checkpoint and the last")
    p.add_argument("--prompts", metavar="FILE", help="UTF-8 file with one prompt per line, or - for standard input (default: the run's)")
    p.add_argument("--samples", type=int, default=8, help="stories per prompt")
    options.add_ema(p)
    options.add_sampling(p)
    p.add_argument("--seed", type=int, default=0, help="story n of each checkpoint is sampled with seed + n")
    p.add_argument("--validation-documents", type=int, default=200, metavar="N", help="held-out documents, evenly spread, to validate on")
    p.add_argument("--data", type=Path, default=None, metavar="DIR", help="the run's data, if it was moved")
    p.add_argument("--print", action="store_true", help="print the stories too")
    p.add_argument("--overwrite", action="store_true", help="replace the files of an earlier sweep without a question")
    p.add_argument("--device", default=None, help="cuda or cpu (default: cuda if available)")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..evaluation.sweep import Sweep, check_outputs, every_nth
    from ..evaluation.sweep_page import write_sweep
    from ..evaluation.trained_run import TrainedRun

    trained = TrainedRun.open(args.run_dir)
    chosen = every_nth(trained.checkpoints, args.every)
    if (existing := check_outputs(trained.folder)) and not args.overwrite:
        confirm_overwriting(existing)
    prompts = options.read_prompts(args.prompts) if args.prompts else list(dict.fromkeys(trained.config["log.prompts"])) or [""]
    sampling = options.sampling(args)
    console = Console(markup=False, highlight=False)
    console.soft_wrap = not console.is_terminal
    if trained.being_written:
        console.print(f"{', '.join(trained.being_written)} is incomplete and left out", style="yellow")
    if len(chosen) == 1 < len(trained.checkpoints):
        note = f"--every {args.every} leaves one of {len(trained.checkpoints)} checkpoints; --every 1 compares all of them"
        console.print(note, style="yellow")

    rows: list[dict] = []
    left_out: dict[str, str] = {}
    with progress_bar(console) as bar:
        task = bar.add_task("indexing the training text", total=None)
        sweep = Sweep(
            trained, prompts=prompts, samples=args.samples, sampling=sampling, seed=args.seed,
            validation_documents=args.validation_documents, data=args.data, device=args.device, ema=args.ema,
        )  # fmt: skip
        bar.update(task, total=len(chosen) * (1 + len(sweep.prompts)))
        for n, (step, folder) in enumerate(chosen.items()):
            bar.update(task, description=f"step {step}", completed=n * (1 + len(sweep.prompts)))
            try:
                sweep.load(folder)
                rows.append(sweep.measure(step, lambda: bar.advance(task)))
            except (OSError, UserError) as error:  # damaged, deleted by the trainer meanwhile, or not finite
                left_out[folder.name] = str(error)
                bar.console.print(f"{folder.name} is left out: {error}", style="yellow", soft_wrap=True)
    if not rows:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise UserError(f"no checkpoint of {trained.folder} could be measured ({reasons})")
    report = sweep.report(rows, left_out)
    json_path, html_path = trained.folder / "sweep.json", trained.folder / "sweep.html"
    write_sweep(report, json_path, html_path)
    if args.print:
        print_stories(rows, args.samples)
    console.print(table(report), soft_wrap=False)
    for finding in report["findings"]:
        console.print(f"· {finding}")
    documents, searched = report["validation"], report["overlap"]
    console.print(
        f"\nValidation on {share(documents['documents'], documents['of_documents'])} held-out documents. Copied stretches were searched in "
        f"{share(searched['characters'], searched['of_characters'])} characters of the training text.",
    )
    console.print(f"{json_path}\n{html_path}", soft_wrap=True)


def share(n: int, total: int) -> str:
    return f"{n:,} of {total:,}" if n < total else f"all {total:,}"


def confirm_overwriting(paths: list[Path], what: str = "sweep") -> None:
    """Ask at a terminal whether to replace the files. Raises UserError if the answer is no, or without a terminal."""
    names = " and ".join(map(str, paths))
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(f"an earlier {what} wrote {names}; give --overwrite to replace it, or move it away")
    print(wrapped(f"Replace {names} of an earlier {what}? [y/N]"), end=" ", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError(f"nothing was measured, and the earlier {what} is unchanged")


def print_stories(rows: list[dict], samples: int) -> None:
    for row in rows:
        for story in row["stories"]:
            sample = f", sample {story['sample'] + 1} of {samples}" if samples > 1 else ""
            print(f"── step {row['step']:,}{sample}\n{story['prompt']}{story['text']}\n")


def table(report: dict):
    """The measures of each checkpoint, and of held-out stories in the last row."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=0, show_edge=False)
    names = "step", "bits\n/char", "repeated", "loop", "distinct\n1, 2, 3", "chars", "ends", "cast", "coherent", "copied"
    for name in names:
        if name != "cast" or report["checks_cast"]:
            result.add_column(name, justify="right", no_wrap=True)
    for row in [*report["checkpoints"], report["reference"]]:
        if "step" not in row:
            result.add_section()
        result.add_row(
            f"{row['step']:,}" if "step" in row else "held-out",
            f"{row['val_bits_per_char']:.3f}" if "step" in row else "–",
            f"{row['repeated_4grams']:.1%}",
            f"{row['longest_loop']:.0f}",
            " ".join(f"{row[f'distinct_{n}']:.2f}" for n in (1, 2, 3)),
            f"{row['length']:.0f}",
            f"{row['ends_properly']:.0%}",
            *([f"{row['consistent']:.0%}"] if report["checks_cast"] else []),
            f"{row['coherent']:.0%}",
            f"{row['overlap']:.0f}",
        )
    return result
