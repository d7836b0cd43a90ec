"""Options that several commands share."""

import argparse

from ..common.sampling import Sampling


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
