"""Options that several commands share."""

import argparse
import sys
from pathlib import Path

from ..common.errors import UserError
from ..common.sampling import Sampling

CHECKPOINT = "checkpoint folder, or a run for its newest checkpoint"


def add_model(p: argparse.ArgumentParser, name: str, help: str) -> None:
    """Add the folder of a checkpoint or run, as a positional argument and as --model. It is required, and `main` makes it a Path."""
    p.add_argument(name, nargs="?", default=argparse.SUPPRESS, metavar="DIR", help=help)
    p.add_argument("--model", default=None, dest=name, metavar="DIR", help="the same as DIR")
    p.set_defaults(model_argument=name)


def add_ema(p: argparse.ArgumentParser) -> None:
    p.add_argument("--ema", action="store_true", help="the running mean of the weights, of a run with train.ema")


def add_sampling(p: argparse.ArgumentParser) -> None:
    """Add an option for each setting of `Sampling` but the seed."""
    p.add_argument("--max-new-tokens", type=int, default=Sampling.max_new_tokens, help="longest continuation")
    p.add_argument("--temperature", type=float, default=Sampling.temperature, help="0 always takes the most likely token")
    p.add_argument("--top-k", type=int, default=Sampling.top_k, help="keep the k most likely tokens; 0 keeps all")
    p.add_argument("--top-p", type=float, default=Sampling.top_p, help="keep the most likely tokens that together reach this probability")
    p.add_argument("--min-p", type=float, default=Sampling.min_p, help="drop tokens below this fraction of the highest probability")
    p.add_argument(
        "--repetition-penalty", type=float, default=Sampling.repetition_penalty, help="above 1: repeated tokens become less likely"
    )
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this string; may be given several times")


def sampling(args: argparse.Namespace) -> Sampling:
    """The settings of `add_sampling`. Raises UserError if one is out of range."""
    names = ("max_new_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "stop")
    return Sampling(top_k=args.top_k or None, **{name: getattr(args, name) for name in names})


def add_device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default=None, help="cuda or cpu; by default the GPU if there is one")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights in memory")


def read_prompts(source: str) -> list[str]:
    """The prompts in a file, or in standard input if `source` is "-": one per line, without blank lines and duplicates.

    Raises FileNotFoundError, or UserError if there is none or the text is not UTF-8."""
    if source != "-" and not Path(source).is_file():
        raise FileNotFoundError(f"--prompts {source} is not a file; write one prompt per line into it, or give - for standard input")
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {source} is not UTF-8 ({error}); convert it, for example: iconv -f GB18030 -t UTF-8") from None
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise UserError(f"--prompts {source} has no prompts; write one per line into it")
    return prompts
