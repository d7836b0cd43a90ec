"""tritale generate: write stories with a checkpoint."""

import argparse
import resource
import sys
import time
from pathlib import Path

from ..common.errors import UserError

HELP = "write stories with a checkpoint"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder, such as out/quickstart/step-00000800")
    p.add_argument("--prompt", default=None, help="beginning of the story; without one the terminal asks for prompts, or the model begins")
    p.add_argument("--samples", type=int, default=1, help="how many stories, written side by side")
    p.add_argument("--max-new-tokens", type=int, default=500, help="longest continuation")
    p.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    p.add_argument("--top-k", type=int, default=30, help="keep the k likeliest tokens; 0 keeps all")
    p.add_argument("--top-p", type=float, default=0.9, help="keep the likeliest tokens that reach this probability together")
    p.add_argument("--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest one's probability")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: tokens that were there become less likely")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the story before this text; may be given several times")
    p.add_argument("--seed", type=int, default=None, help="repeats the same stories")
    p.add_argument("--device", default=None, help="cuda, cpu; chosen by itself where not given")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights in memory")


def resident_mib() -> tuple[float, float]:
    """(now, highest so far) of this process's memory, in MiB."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        values = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
        return tuple(int(values[key][0]) / 1024 for key in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):  # not Linux: only the highest is known, in kilobytes, on macOS in bytes
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 / (1024 if sys.platform == "darwin" else 1)
        return highest, highest


def memory_report(llm, runtime_mib: float) -> str:
    """Peak memory in a sentence: on a GPU the allocator's, on a CPU resident, the runtime's own share stated apart."""
    import torch

    weights = sum(p.numel() * p.element_size() for p in llm.model.parameters()) / 2**20
    if llm.model.embedding.is_cuda:
        peak = torch.cuda.max_memory_allocated() / 2**20
        return f"GPU memory {peak:.0f} MiB at its peak, of which weights {weights:.0f}, cache and the rest {peak - weights:.0f}"
    peak = resident_mib()[1]
    return (
        f"memory {peak - runtime_mib:.0f} MiB at its peak on top of the {runtime_mib:.0f} MiB of Python and PyTorch, "
        f"of which weights {weights:.0f}"
    )


def run(args: argparse.Namespace) -> None:
    import torch

    from ..inference import LLM, Sampling
    from ..inference import native as native_code

    runtime_mib = resident_mib()[0]
    settings = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "min_p", "repetition_penalty")}
    settings |= {"top_k": args.top_k or None, "stop": args.stop}
    Sampling(**settings)  # settings out of range are named before the model is loaded
    if args.samples < 1:
        raise UserError(f"--samples is {args.samples}; it must be at least 1")
    llm = LLM.load(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    if not llm.model.embedding.is_cuda and isinstance(native_code.library(), str):
        print(native_code.library(), file=sys.stderr)

    n_tokens, seconds = 0, 0.0

    def write(prompt: str, seed: int | None) -> None:
        nonlocal n_tokens, seconds
        seeds = [None if seed is None else seed + i for i in range(args.samples)]
        began = time.perf_counter()
        for completion in write_stories(llm, prompt, [Sampling(**settings, seed=s) for s in seeds]):
            n_tokens += len(completion.tokens)
        seconds += time.perf_counter() - began

    if args.prompt is None and sys.stdin.isatty() and sys.stdout.isatty():
        ask(write, args.seed)
    else:
        write(args.prompt or "", args.seed)
    if n_tokens:
        speed = f"{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.0f} tokens/s"
        print(f"\n{speed}; {memory_report(llm, runtime_mib)}", file=sys.stderr)


def write_stories(llm, prompt: str, samplings: list) -> list:
    """Print the prompt's stories, one that is alone as it is written, and give their completions."""
    if len(samplings) == 1:
        completions, pieces = [], llm.write([prompt], samplings)
        print(prompt, end="", flush=True)
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
    print("\n\n".join(prompt + completion.text for completion in completions), flush=True)
    return completions


def ask(write, seed: int | None) -> None:
    """Stories for the prompts that are typed, until the end of input. The n-th prompt draws with seed + n."""
    try:
        import readline  # noqa: F401  (line editing in input())
    except ImportError:
        pass
    print("Type the beginning of a story, or nothing to let the model begin; Ctrl-D ends.", file=sys.stderr)
    n = 0
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            write(prompt, None if seed is None else seed + n)
        except ValueError as error:  # a prompt that is too long: ask again
            print(error, file=sys.stderr)
        except KeyboardInterrupt:  # ends this story, not the conversation
            print()
        n += 1
