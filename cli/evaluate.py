"""tritale evaluate: how often models write the story that they are asked for."""

import argparse
from pathlib import Path

from ..common.console import progress_bar
from ..common.errors import UserError
from . import options

HELP = "how often models meet the requirements of held-out instructions, with measures of their stories"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("models", nargs="+", type=Path, metavar="DIR", help=options.CHECKPOINT + "; several are compared")
    p.add_argument("--instructions", type=Path, metavar="FILE", help="held_out.jsonl of tritale instruct (default: made from the data)")
    p.add_argument("--data", type=Path, metavar="DIR", help="data folder of plain stories (default: that of the first model)")
    p.add_argument("--held-out", type=int, default=500, metavar="N", help="instructions to make from held-out stories")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for evaluate.json and evaluate.html (default: the last run)")
    options.add_sampling(p)
    p.add_argument("--seed", type=int, default=0, help="story n of each model is sampled with seed + n")
    p.add_argument("--validation-documents", type=int, default=200, metavar="N", help="held-out stories for the bits per character")
    p.add_argument("--overwrite", action="store_true", help="replace the files of an earlier evaluation without a question")
    p.add_argument("--device", default=None, help="cuda or cpu (default: cuda if available)")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape

    from ..common.run_folder import is_checkpoint
    from ..evaluation.instructions import Evaluation, context_of, data_of
    from ..evaluation.instructions_page import write_evaluation
    from ..evaluation.sweep import check_outputs
    from ..inference.llm import LLM
    from ..instructions.samples import make_samples, open_stories, read_samples
    from .sweep import confirm_overwriting

    folders = list(dict.fromkeys(args.models))
    contexts = [context_of(folder) for folder in folders]  # raises for a folder that is no model, before the slow work
    out = args.out or (folders[-1].resolve().parent if is_checkpoint(folders[-1].resolve()) else folders[-1])
    if (existing := check_outputs(out, "evaluate", "tritale-evaluation")) and not args.overwrite:
        confirm_overwriting(existing, "evaluation")
    if args.held_out < 1:
        raise UserError(f"--held-out is {args.held_out}; it must be at least 1")
    sampling = options.sampling(args)
    data = args.data or data_of(folders)
    console = Console(markup=False, highlight=False)
    console.soft_wrap = not console.is_terminal
    rows: dict[str, dict] = {}
    with progress_bar(console) as bar:
        if args.instructions:
            samples = read_samples(args.instructions)
        else:
            from ..data.tokenizer import Tokenizer

            held_out = open_stories(data, track=lambda items, description: bar.track(items, description=description))[1]
            tokenizer = Tokenizer.load(data / "tokenizer")
            samples = list(make_samples(held_out, args.held_out, seed=args.seed, tokenizer=tokenizer, context=min(contexts)))
        task = bar.add_task("indexing the training text", total=None)
        settings = {"sampling": sampling, "seed": args.seed, "validation_documents": args.validation_documents}
        evaluation = Evaluation(samples, data, **settings)
        bar.update(task, total=len(folders) * (1 + len(samples)))
        for folder in folders:
            bar.update(task, description=escape(str(folder)))
            llm = LLM.load(folder, device=args.device)
            rows[str(folder)] = evaluation.measure(llm, lambda: bar.advance(task))
    report = evaluation.report(rows)
    paths = out / "evaluate.json", out / "evaluate.html"
    write_evaluation(report, *paths)
    console.print(table(report), soft_wrap=False)
    console.print(
        f"{len(samples):,} held-out instructions; in brackets 95 % intervals. By chance: the story of another instruction.\n"
        f"{paths[0]}\n{paths[1]}",
        soft_wrap=True,
    )


def table(report: dict):
    """The figures of each model in a column; the rows are those of `instructions_page.figures`."""
    from rich import box
    from rich.table import Table

    from ..evaluation.instructions_page import figures

    result = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), show_edge=False)
    result.add_column("", no_wrap=True)
    result.add_column("n", justify="right")
    for name in [*(row["model"] + ("" if row["is_asked"] else "\n(not asked)") for row in report["models"]), "by chance", "held-out"]:
        result.add_column(name, justify="right", overflow="fold")
    for title, group in figures(report):
        result.add_section()
        result.add_row(title, style="bold")
        for name, n, cells in group:
            result.add_row(f"  {name}", n, *(cell.text for cell in cells))
    return result
