"""tritale generate: generate stories with a checkpoint."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..common.errors import UserError
from ..common.sampling import Sampling
from . import options

if TYPE_CHECKING:
    from ..data.chat import Messages
    from ..inference import LLM, Completion

HELP = "generate stories with a checkpoint"


def add_arguments(p: argparse.ArgumentParser) -> None:
    options.add_model(p, "model", options.CHECKPOINT)
    p.add_argument(
        "--prompt",
        default=None,
        help="beginning of the story; - reads one per line from standard input (default: a terminal asks, otherwise it is empty)",
    )
    p.add_argument(
        "--instruct",
        action="store_true",
        help="the prompt is an instruction, such as 写一个有对话的故事。",
    )
    p.add_argument("--samples", type=int, default=1, help="how many stories, in one batch")
    options.add_ema(p)
    options.add_sampling(p)
    p.add_argument("--seed", type=int, default=None, help="repeats the same stories")
    options.add_device(p)


def memory_report(llm: "LLM", runtime_mib: float) -> str:
    """Peak memory in a line: on a GPU that of the allocator, on a CPU the resident memory beyond `runtime_mib`."""
    import torch

    from ..training.processes import peak_memory_gib

    weights = sum(p.numel() * p.element_size() for p in llm.model.parameters()) / 2**20
    if llm.model.embedding.is_cuda:
        peak = torch.cuda.max_memory_allocated() / 2**20
        return f"GPU memory {peak:.0f} MiB at its peak (weights {weights:.0f})"
    peak = 1024 * peak_memory_gib(torch.device("cpu"))
    return f"memory {peak - runtime_mib:.0f} MiB at its peak (weights {weights:.0f}), and {runtime_mib:.0f} MiB of Python and PyTorch"


def run(args: argparse.Namespace) -> None:
    import psutil
    import torch

    from ..inference import LLM, native

    runtime_mib = psutil.Process().memory_info().rss / 2**20
    sampling = options.sampling(args)  # before the model is loaded
    if args.samples < 1:
        raise UserError(f"--samples is {args.samples}; it must be at least 1")
    llm = LLM.load(args.model, device=args.device, dtype=getattr(torch, args.dtype), ema=args.ema)
    if not llm.model.embedding.is_cuda and (problem := native.problem()):
        print(problem, file=sys.stderr)

    n_tokens, seconds = 0, 0.0

    def write(prompt: str, seed: int | None) -> None:
        nonlocal n_tokens, seconds
        seeds = [None if seed is None else seed + i for i in range(args.samples)]
        began = time.perf_counter()
        given = [{"role": "user", "content": prompt}] if args.instruct else prompt
        for completion in write_stories(llm, given, [replace(sampling, seed=s) for s in seeds]):
            n_tokens += len(completion.tokens)
        seconds += time.perf_counter() - began

    if args.prompt is None and sys.stdin.isatty() and sys.stdout.isatty():
        interact(write, args.seed, "an instruction" if args.instruct else "the beginning of a story, or press Enter for any story")
    else:
        for n, prompt in enumerate(options.read_prompts("-") if args.prompt == "-" else [args.prompt or ""]):
            write(prompt, None if args.seed is None else args.seed + n)
    if n_tokens:
        print(f"\n{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.0f} tokens/s", file=sys.stderr)
        print(memory_report(llm, runtime_mib), file=sys.stderr)


def write_stories(llm: "LLM", prompt: "str | Messages", samplings: list[Sampling]) -> "list[Completion]":
    """Print the stories of the prompt and return their completions. A single story is printed as it is generated."""
    beginning = prompt if isinstance(prompt, str) else ""
    if len(samplings) == 1:
        completions, pieces = [], llm.write([prompt], samplings)
        print(beginning, end="", flush=True)
        for _, piece, completion in pieces:
            print(piece, end="", flush=True)
            completions += [completion] if completion else []
        print()
        return completions

    from rich.console import Console
    from rich.progress import Progress

    done = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{len(samplings)} stories", total=len(samplings))
        for i, _, completion in llm.write([prompt] * len(samplings), samplings):
            if completion:
                done[i] = completion
                progress.advance(task)
    completions = [done[i] for i in range(len(samplings))]
    print("\n\n".join(beginning + completion.text for completion in completions), flush=True)
    return completions


def interact(write: Callable[[str, int | None], None], seed: int | None, what: str) -> None:
    """Generate a story for each prompt that is typed, until the end of input. The n-th prompt uses seed + n."""
    try:
        import readline  # noqa: F401  (line editing in input())
    except ImportError:
        pass
    print(f"Type {what}; Ctrl-D ends.", file=sys.stderr)
    n = 0
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            write(prompt, None if seed is None else seed + n)
        except UserError as error:  # a prompt that is too long
            print(error, file=sys.stderr)
        except KeyboardInterrupt:  # ends this story only
            print()
        n += 1
