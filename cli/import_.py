"""tritale import: convert checkpoints of litgpt or Hugging Face."""

import argparse
from pathlib import Path

HELP = "convert a litgpt or Hugging Face checkpoint (Llama, Mistral or Qwen3 architecture), or a run of them"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="DIR", type=Path, help="a checkpoint, or a folder of checkpoints such as litgpt's step-… folders")
    p.add_argument("--from", dest="kind", required=True, choices=("litgpt", "hf"), help="the program that wrote it")
    p.add_argument("--out", required=True, metavar="DIR", type=Path, help="new folder; of a run, each checkpoint keeps its name in it")


def run(args: argparse.Namespace) -> None:
    from ..model.importer import convert, find_sources

    sources = find_sources(args.source, args.kind)
    for source in sources:
        out = args.out if source == args.source else args.out / source.name
        convert(source, out, args.kind)
        print(f"{out} is written")
    print(f"Next: tritale generate --model {args.out} --prompt 从前，")
