"""tritale sweep: the stories of a run's checkpoints, measured and side by side."""

import argparse
from pathlib import Path

from ..common.errors import UserError

HELP = "compare what a run's checkpoints write: repetition, endings, consistency, copying"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "run_dir", metavar="OUT_DIR", help="folder of a run, such as out/quickstart; sweep.json and sweep.html are written there"
    )
    p.add_argument("--every", type=int, default=1, metavar="N", help="each N-th checkpoint, and the last")
    p.add_argument(
        "--prompts", type=Path, default=None, metavar="FILE", help="UTF-8 file with one prompt a line; without one those of the run"
    )
    p.add_argument("--samples", type=int, default=8, help="stories for each prompt")
    p.add_argument("--max-new-tokens", type=int, default=500, help="longest continuation")
    p.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    p.add_argument("--top-k", type=int, default=30, help="keep the k likeliest tokens; 0 keeps all")
    p.add_argument("--top-p", type=float, default=0.9, help="keep the likeliest tokens that reach this probability together")
    p.add_argument("--seed", type=int, default=0, help="the n-th story of each checkpoint is drawn with seed + n")
    p.add_argument("--validation-documents", type=int, default=200, metavar="N", help="held-out documents, evenly spread, to validate on")
    p.add_argument("--data", type=Path, default=None, metavar="DIR", help="the run's data, where it is not at its old place")
    p.add_argument("--device", default=None, help="cuda, cpu; chosen by itself where not given")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from ..evaluation.sweep import Run, Sweep, check_outputs, every_nth, read_prompts
    from ..evaluation.sweep_page import write_sweep
    from ..inference import Sampling

    opened = Run.open(args.run_dir)
    chosen = every_nth(opened.checkpoints, args.every)
    json_path, html_path = check_outputs(opened.folder)
    prompts = read_prompts(args.prompts) if args.prompts else list(dict.fromkeys(opened.config["log.prompts"])) or [""]
    settings = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p")} | {"top_k": args.top_k or None}
    sampling = Sampling(**settings)
    console = Console()
    if opened.being_written:
        console.print(f"{', '.join(opened.being_written)} is not finished and is left out", style="yellow")
    if len(chosen) == 1 < len(opened.checkpoints):
        console.print(
            f"--every {args.every} leaves one of {len(opened.checkpoints)} checkpoints; --every 1 compares all of them", style="yellow"
        )

    rows, left_out = [], {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading the training text", total=None)
        sweep = Sweep(
            opened, prompts=prompts, samples=args.samples, sampling=sampling, seed=args.seed,
            validation_documents=args.validation_documents, data=args.data, device=args.device,
        )  # fmt: skip
        bar.update(task, total=len(chosen) * (1 + len(sweep.prompts)))
        for n, (step, folder) in enumerate(chosen.items()):
            bar.update(task, description=f"step {step}", completed=n * (1 + len(sweep.prompts)))
            try:
                sweep.load(folder)
                rows.append(sweep.measure(step, lambda: bar.advance(task)))
            except (OSError, ValueError) as error:  # damaged, removed by the trainer in the meantime, or not finite
                left_out[folder.name] = str(error)
                bar.console.print(f"{folder.name} is left out: {error}", style="yellow", markup=False, soft_wrap=True)
    if not rows:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise UserError(f"no checkpoint of {opened.folder} could be measured ({reasons})")
    report = sweep.report(rows, left_out)
    write_sweep(report, json_path, html_path)
    console.print(table(report))
    for finding in report["findings"]:
        console.print(f"· {finding}", markup=False, highlight=False, soft_wrap=True)
    about = report["validation"]
    console.print(
        f"\nValidation on {about['documents']:,} of {about['of_documents']:,} held-out documents; copied stretches looked for in "
        f"{report['overlap']['characters']:,} of {report['overlap']['of_characters']:,} characters.\n{json_path}\n{html_path}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def table(report: dict):
    """The figures of each checkpoint, and of held-out stories below."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    names = (
        "step",
        "bits\n/char",
        "repea-\nted",
        "loop",
        "dist-\n1",
        "inct-\n2",
        "\n3",
        "chars",
        "ends",
        "peo-\nple",
        "cohe-\nrent",
        "copy",
    )
    for name in names:
        if name != "peo-\nple" or report["checks_cast"]:
            result.add_column(name, justify="right", no_wrap=True)
    for row in [*report["checkpoints"], report["reference"]]:
        is_real = row is report["reference"]
        if is_real:
            result.add_section()
        result.add_row(
            "real" if is_real else f"{row['step']:,}",
            "–" if is_real else f"{row['val_bits_per_char']:.3f}",
            f"{row['repeated_4grams']:.1%}",
            f"{row['longest_loop']:.0f}",
            *(f"{row[f'distinct_{n}']:.2f}" for n in (1, 2, 3)),
            f"{row['length']:.0f}",
            f"{row['ends_properly']:.0%}",
            *([f"{row['consistent']:.0%}"] if report["checks_cast"] else []),
            f"{row['coherent']:.0%}",
            f"{row['overlap']:.0f}",
        )
    return result
