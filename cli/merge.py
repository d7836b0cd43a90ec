"""tritale merge: an ordinary checkpoint from the adapter of a LoRA run."""

import argparse
from pathlib import Path

from ..common.errors import UserError
from . import options

HELP = "merge the adapter of a run with lora.rank into the weights of its base, as an ordinary checkpoint"


def add_arguments(p: argparse.ArgumentParser) -> None:
    options.add_model(p, "model", options.CHECKPOINT)
    p.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder to write; it must not exist")


def run(args: argparse.Namespace) -> None:
    from ..common.run_folder import find_checkpoint, is_adapter
    from ..inference import LLM
    from ..model.checkpoint import base_of
    from ..model.export import export_merged

    folder = find_checkpoint(args.model)
    llm = LLM.load(folder, device="cpu")
    if not is_adapter(folder):
        raise UserError(f"{folder} has no adapter: its weights are whole, so there is nothing to merge")
    export_merged(llm.model, llm.tokenizer, args.out)
    print(f"{args.out} is written: {base_of(folder).folder} with the adapter of {folder}")
    print(f"Next: tritale generate --model {args.out}")
