"""tritale plan: the size, schedule, memory and time of a run, before it starts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..common.console import duration

if TYPE_CHECKING:
    from rich.console import Console

    from ..training.config import RunConfig
    from ..training.plan import Plan, PlanWarning

HELP = "print a run's size, epochs, learning rate, memory, disk and time before it starts, with warnings"
TAKES_CONFIG = True


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--config", default=None, metavar="FILE", help="YAML file; configs/quickstart.yaml if not given")
    p.add_argument("--tokens", type=int, default=None, help="number of tokens of training data that is not prepared yet")
    p.add_argument("--vocab-size", type=int, default=None, help="vocabulary size of data that is not prepared yet")
    p.add_argument("--processes", type=int, default=1, help="number of processes of the run")
    p.add_argument("--no-measure", action="store_true", help="do not measure the time of a step")
    p.epilog = "Keys of the config are set as for train.py: --train.micro_batch 16 …"


def run(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import track

    from ..evaluation.compatibility import compatibility_warnings
    from ..training import processes
    from ..training.config import at_least, parse
    from ..training.plan import DeviceFacts, known_data, plan
    from ..training.step import explain_errors, measure

    for name in ("tokens", "vocab_size", "processes"):
        if getattr(args, name) is not None:
            at_least(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    config = parse(args.overrides, file=args.config, prog="tritale plan")
    console = Console(markup=False, highlight=False)
    console.soft_wrap = not console.is_terminal
    here = processes.start()
    device = replace(DeviceFacts.of(here, config), count=args.processes)
    planned = plan(config, known_data(config, tokens=args.tokens, vocab_size=args.vocab_size), device)
    warnings = [*planned.warnings, *compatibility_warnings(planned.shape)]
    if args.tokens is None and args.vocab_size is None:
        warnings = [*data_warnings(config), *warnings]
    time = None
    if not args.no_measure and planned.largest_micro_batch:
        with explain_errors(config):
            time = measure(planned, here, lambda items, text: track(items, text, console=console, transient=True))
    print_plan(planned, warnings, time, console, title=args.config or "configs/quickstart.yaml")


def data_warnings(config: RunConfig) -> list[PlanWarning]:
    """A warning if there is no data at data.source. Raises FileNotFoundError or UserError if train.py could not read the data."""
    from ..data.built_in import open_data
    from ..training.plan import PlanWarning

    folder = config.data_folder
    if (folder / "train").exists():
        open_data(folder, verify=False)
    elif config.data.source != "built-in":
        remedy = f"make it with tritale prepare --out {folder}, or correct data.source; --tokens and --vocab-size plan without it"
        return [PlanWarning(f"there is no prepared data at {folder}: the number of tokens is unknown, and train.py will stop", remedy)]
    return []


def print_plan(planned: Plan, warnings: list[PlanWarning], time: tuple[float, int] | None, console: Console, *, title: str) -> None:
    """Print the plan. `time`: seconds of an optimizer step, and the micro-batch it was measured with."""
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    from ..training.plan import size

    rows, s, train, memory = planned.rows(), planned.shape, planned.config.train, planned.memory
    rows["model"] += (
        f"\n{s.n_layer} layers, {s.n_head} heads of {s.head_dim} ({s.n_kv_head} for keys and values), width {s.width}, MLP {s.mlp_width}, "
        f"vocabulary {s.vocab_size:,}, context {s.context}"
    )
    rows["learning rate"] += "\n" + sparkline(planned)
    for name, n_bytes in memory._asdict().items():
        if n_bytes == 0:
            continue
        name += f" of {train.micro_batch} × {planned.sequence}" if name == "activations" else ""
        rows["memory"] += f"\n{'█' * round(24 * n_bytes / memory.total):24} {size(n_bytes):>8}  {name}"
    if time:
        seconds, micro_batch = time
        rows["time"] = (
            f"{duration(seconds * train.max_steps)} for {train.max_steps:,} steps of {duration(seconds)}: "
            f"{planned.tokens_per_step / seconds:,.0f} tokens/s (measured now with {micro_batch} × {planned.sequence} random tokens; "
            "without validation and checkpoints)"
        )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(Rule(Text(f"plan of {title}"), align="left"))
    console.print(table, soft_wrap=False)
    for warning in sorted(warnings, key=lambda w: w.is_note):
        label = Text("note: ", style="cyan") if warning.is_note else Text("warning: ", style="bold yellow")
        console.print("\n", label, warning.text, f"\n  → {warning.remedy}", sep="")
    if all(w.is_note for w in warnings):
        console.print("\nNo warnings.", style="green")


def sparkline(planned: Plan, width: int = 60) -> str:
    """The learning rate over the run, as a line of block characters."""
    from ..training.optimizer import lr_factor

    steps = planned.config.train.max_steps
    factors = [lr_factor(round(i * (steps - 1) / (width - 1)), steps, planned.config.optim) for i in range(width)]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * f))] for f in factors)
