"""tritale instruct: instruction data from the stories of a data folder."""

import argparse
from collections import Counter
from pathlib import Path

HELP = "make instruction data from stories: what each one was asked for, and the story"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("data", metavar="DATA", type=Path, help="a data folder, such as out/quickstart/data or the --out of tritale prepare")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for train.jsonl and held_out.jsonl")
    p.add_argument("--samples", type=int, default=20_000, metavar="N", help="training samples")
    p.add_argument("--held-out", type=int, default=500, metavar="N", help="samples from held-out stories")
    p.add_argument("--context", type=int, default=None, metavar="N", help="leave out samples with more tokens than the model's context")
    p.add_argument("--copies", type=int, default=0, metavar="N", help="also write N exercises in copying to copies.jsonl")
    p.add_argument("--in-order", action="store_true", help="always give the requirements in the same order")
    p.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    from ..common.errors import UserError
    from ..data.tokenizer import Tokenizer
    from ..instructions.copies import COPIES, make_copies
    from ..instructions.samples import HELD_OUT, TRAIN, Sample, make_samples, open_stories, write_samples

    if args.samples < 1 or args.held_out < 1 or args.copies < 0:
        sizes = f"--samples ({args.samples}) and --held-out ({args.held_out}) must be at least 1, --copies ({args.copies}) at least 0"
        raise UserError(sizes)
    console = Console(markup=False, highlight=False)
    show = lambda items, description: track(items, description, console=console, transient=True)
    splits = open_stories(args.data, track=show)
    tokenizer = Tokenizer.load(args.data / "tokenizer")
    settings = {"seed": args.seed, "tokenizer": tokenizer, "context": args.context, "in_order": args.in_order}
    samples: list[Sample] = []
    for name, stories, n in zip((TRAIN, HELD_OUT), splits, (args.samples, args.held_out), strict=True):
        made = make_samples(stories, n, **settings)
        samples = list(track(made, f"writing {name}", total=n, console=console, transient=True))
        write_samples(args.out / name, samples)
        kinds = Counter(r.kind for sample in samples for r in sample.requirements)
        console.print(f"{args.out / name}  {n:,} samples: {', '.join(f'{kind} {k:,}' for kind, k in kinds.most_common())}", soft_wrap=True)
    if args.copies:
        write_samples(args.out / COPIES, make_copies(tokenizer, args.copies, seed=args.seed))
        console.print(f"{args.out / COPIES}  {args.copies:,} exercises in copying", soft_wrap=True)
    for sample in samples[:3]:
        console.print(f"\n{sample.messages[0]['content']}", style="bold")
        console.print(sample.story)
