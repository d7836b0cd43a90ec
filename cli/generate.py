"""tritale generate: write stories with a checkpoint."""

import argparse

HELP = "write stories with a checkpoint"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder, such as out/quickstart/step-00000800")
    p.add_argument("--prompt", default="", help="beginning of the story; without one the model begins")
    p.add_argument("--samples", type=int, default=1, help="how many stories")
    p.add_argument("--max-new-tokens", type=int, default=500, help="longest continuation")
    p.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    p.add_argument("--top-k", type=int, default=30, help="keep the k likeliest tokens; 0 keeps all")
    p.add_argument("--top-p", type=float, default=0.9, help="keep the likeliest tokens that reach this probability together")
    p.add_argument("--seed", type=int, default=None, help="repeats the same stories")
    p.add_argument("--device", default=None, help="cuda, cpu; chosen by itself where not given")


def run(args: argparse.Namespace) -> None:
    from ..model import LLM

    llm = LLM.load(args.model, device=args.device)
    settings = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k or None, top_p=args.top_p)
    for i in range(args.samples):
        seed = None if args.seed is None else args.seed + i
        print(args.prompt + llm.generate(args.prompt, seed=seed, **settings), flush=True)
        if i + 1 < args.samples:
            print()
