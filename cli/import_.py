"""tritale import: convert checkpoints of litgpt or Hugging Face."""

import argparse
import sys
from pathlib import Path

from ..common.errors import UserError

HELP = "convert a litgpt or Hugging Face checkpoint (Llama, Mistral or Qwen3 architecture), or a run of them"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="DIR", type=Path, help="a checkpoint, or a folder of checkpoints such as litgpt's step-… folders")
    p.add_argument("--from", dest="kind", required=True, choices=("litgpt", "hf"), help="the program that wrote it")
    p.add_argument("--out", required=True, metavar="DIR", type=Path, help="new folder; of a run, each checkpoint keeps its name in it")


def run(args: argparse.Namespace) -> None:
    from ..model.importer import convert, find_sources

    sources, failed = find_sources(args.source, args.kind), 0
    for source in sources:
        is_run = source != args.source
        out = args.out / source.name if is_run else args.out
        if is_run and out.exists():
            print(f"{out} exists and is kept")
            continue
        try:
            convert(source, out, args.kind)
            print(f"{out} is written")
        except (UserError, FileNotFoundError) as error:
            if not is_run:
                raise
            print(error, file=sys.stderr)
            failed += 1
    if failed:
        raise UserError(f"{failed} of {len(sources)} checkpoints could not be converted; the others are in {args.out}")
    print(f"Next: tritale generate --model {args.out} --prompt 从前，")
