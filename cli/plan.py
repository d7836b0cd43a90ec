"""tritale plan: what a run will do, before it runs."""

import argparse

HELP = "tell what a run will do before it runs: size, epochs, learning rate, memory, disk, time, and what to think about"
TAKES_CONFIG = True


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--config", default=None, metavar="FILE", help="YAML file; the quick start's where not given")
    p.add_argument("--tokens", type=int, default=None, help="tokens of the training data, where it is not prepared yet")
    p.add_argument("--vocab-size", type=int, default=None, help="entries of its tokenizer")
    p.add_argument("--processes", type=int, default=1, help="how many processes torchrun will start")
    p.add_argument("--no-measure", action="store_true", help="do not measure a step, and tell no time")
    p.epilog = "Keys of the config can be changed as for train.py: --train.micro_batch 16 …"


def run(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import track

    from ..training import processes
    from ..training.config import at_least, parse
    from ..training.plan import DeviceFacts, known_data, plan
    from ..training.step import measure

    for name, least in (("tokens", 1), ("vocab_size", 1), ("processes", 1)):
        if getattr(args, name) is not None:
            at_least(f"--{name.replace('_', '-')}", getattr(args, name), least)
    config = parse([*(["--config", args.config] if args.config else []), *args.overrides], prog="tritale plan")
    console = Console(highlight=False, soft_wrap=True)
    here = processes.start()
    facts = replace(DeviceFacts.of(here, config), count=args.processes)
    planned = plan(config, known_data(config, tokens=args.tokens, vocab_size=args.vocab_size), facts)
    if args.tokens is None and args.vocab_size is None:
        planned = replace(planned, remarks=(*data_remarks(config), *planned.remarks))
    step = None
    if not args.no_measure:
        step = measure(planned, here.device, lambda items, text: track(items, text, console=console, transient=True))
    show(planned, step, console, title=args.config or "configs/quickstart.yaml")


def data_remarks(config) -> list:
    """A warning where there is no data at `data.source`. Raises FileNotFoundError or ValueError for data that train.py could not read."""
    from ..data.built_in import open_data
    from ..training.plan import Remark

    folder = config.data_folder
    if (folder / "train").exists():
        open_data(folder, verify=False)
    elif config.data.source != "built-in":
        remedy = f"make it with tritale prepare --out {folder}, or correct data.source; --tokens and --vocab-size plan without it"
        return [Remark(f"there is no prepared data at {folder}, so the number of tokens is unknown and train.py will stop", remedy)]
    return []


def show(planned, step: tuple[float, int] | None, console, *, title: str) -> None:
    """Print the plan. `step`: seconds of an optimizer step and the micro-batch they were measured with."""
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    from ..training.plan import size

    rows = planned.rows()
    s = planned.shape
    rows["model"] += (
        f"\n{s.n_layer} layers, {s.n_head} heads of {s.head_dim} ({s.n_kv_head} for keys and values), width {s.width}, MLP {s.mlp_width}, "
        f"vocabulary {s.vocab_size:,}, context {s.context}"
    )
    rows["learning rate"] += "\n" + sparkline(planned)
    memory = planned.memory
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        f"activations of {planned.config.train.micro_batch} × {planned.sequence}": memory.activations,
        "loss": memory.loss,
    }
    for name, n_bytes in parts.items():
        rows["memory"] += f"\n{'█' * round(30 * n_bytes / memory.total):30} {size(n_bytes):>8}  {name}"
    if step:
        seconds, micro_batch = step
        rows["time"] = (
            f"{duration(seconds * planned.config.train.max_steps)} for {planned.config.train.max_steps:,} steps of {duration(seconds)}: "
            f"{planned.tokens_per_step / seconds:,.0f} tokens/s (measured now, {micro_batch} × {planned.sequence} random tokens at a time; "
            "without validation and checkpoints)"
        )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(Rule(Text(f"plan of {title}"), align="left"))
    console.print(table, soft_wrap=False)
    for mark, style, remarks in (("warning", "bold yellow", planned.warnings), ("note", "cyan", planned.notes)):
        for remark in remarks:
            console.print()
            console.print(Text(f"{mark}: ", style=style) + Text(remark.text))
            console.print(Text(f"  → {remark.remedy}"))
    if not planned.warnings:
        console.print("\nNo warnings.", style="green")


def sparkline(planned, width: int = 60) -> str:
    """The learning rate over the run."""
    from ..training.optimizer import lr_factor

    steps = planned.config.train.max_steps
    factors = [lr_factor(round(i * (steps - 1) / (width - 1)), steps, planned.config.optim) for i in range(width)]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * f))] for f in factors)


def duration(seconds: float) -> str:
    for unit, n in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * n:
            return f"{seconds / n:,.{int(seconds < 10 * n)}f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
