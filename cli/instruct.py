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
    p.add_argument(
        "--copies", type=int, default=0, metavar="N", help="also write N exercises in copying to copies.jsonl, and N altered samples"
    )
    p.add_argument("--summaries", type=int, default=0, metavar="N", help="also write N samples that ask for a summary to train.jsonl")
    p.add_argument("--in-order", action="store_true", help="always give the requirements in the same order")
    p.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    from ..common.errors import UserError
    from ..data.tokenizer import Tokenizer
    from ..instructions.copies import COPIES, make_copies
    from ..instructions.samples import HELD_OUT, TRAIN, Sample, fitting, make_samples, make_summaries, open_stories, write_samples

    if args.samples < 1 or args.held_out < 1 or args.copies < 0 or args.summaries < 0:
        sizes = f"--samples ({args.samples}) and --held-out ({args.held_out}) must be at least 1"
        raise UserError(f"{sizes}, --copies ({args.copies}) and --summaries ({args.summaries}) at least 0")
    console = Console(markup=False, highlight=False)
    show = lambda items, description: track(items, description, console=console, transient=True)
    splits = open_stories(args.data, track=show)
    tokenizer = Tokenizer.load(args.data / "tokenizer")
    settings = {"seed": args.seed, "tokenizer": tokenizer, "context": args.context, "in_order": args.in_order}
    asked = make_summaries(splits[0], args.summaries, seed=args.seed)
    summaries = list(track(asked, "writing summaries", total=args.summaries, console=console, transient=True))
    made: dict[str, list[Sample]] = {}
    for name, stories, n in zip((TRAIN, HELD_OUT), splits, (args.samples, args.held_out), strict=True):
        samples = make_samples(stories, n, **settings)
        made[name] = list(track(samples, f"writing {name}", total=n, console=console, transient=True))
        write_samples(args.out / name, [*made[name], *summaries] if name == TRAIN else made[name])
        kinds = Counter(r.kind for sample in made[name] for r in sample.requirements)
        console.print(f"{args.out / name}  {n:,} samples: {', '.join(f'{kind} {k:,}' for kind, k in kinds.most_common())}", soft_wrap=True)
    if summaries:
        console.print(f"{args.out / TRAIN}  {len(summaries):,} more samples, which ask for a summary", soft_wrap=True)
    if args.copies:
        copies = list(make_copies(tokenizer, made[TRAIN][: args.copies], seed=args.seed))
        if args.context:  # an altered sentence may have more tokens
            copies = fitting(copies, tokenizer, args.context)
        write_samples(args.out / COPIES, copies)
        console.print(f"{args.out / COPIES}  {len(copies):,} exercises in copying and altered samples", soft_wrap=True)
    for sample in made[HELD_OUT][:3]:
        console.print(f"\n{sample.messages[0]['content']}", style="bold")
        console.print(sample.story)
