"""A race of recipes: python -m bench.race series adamw ours@0.4 ours@0.7 [--data DIR] [--seeds 1 2 3]

Each run trains the same model on the same text with the project's trainer and is validated at its end, in bits per character. `ours@0.4`
reads 0.4 of the characters, with its schedule scaled to them: a schedule ends where the run ends, so each share is a run of its own. A run
may change keys of its recipe: "adamw@0.5 optim.lr=0.004". Results are lines of a JSON-lines file; runs that it already holds are passed
over. `--times` measures the seconds of a step, in turns. `--report` writes the tables and the chart of docs/race.md from the results.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bench.report import BLUE, GREEN, GREY, PURPLE, RED, ROOT, SKY, Table, distinct, grouped, new_figure, times, write_between_markers
from tritale.common.errors import UserError, sentence
from tritale.data.batches import Batches
from tritale.data.built_in import open_data, write_built_in
from tritale.data.shards import Split
from tritale.evaluation.validation import validate
from tritale.model import GPT
from tritale.training import processes
from tritale.training.config import RunConfig, parse
from tritale.training.logs import Log
from tritale.training.plan import DataFacts, DeviceFacts, plan
from tritale.training.step import TrainingStep, explain_errors

BEGIN = "<!-- measured: python -m bench.race --report -->"
OURS = "ours"
ADAMW = {"optim.matrices": "adamw", "optim.weight_decay": 0.1, "optim.betas": "[0.9,0.95]"}
UNTUNED = ADAMW | {"optim.lr": 5e-4, "optim.embedding_lr": "null", "train.global_batch": 1, "init": "normal"}
COSINE = UNTUNED | {"optim.schedule": "cosine"}
TUNED = ADAMW | {"train.global_batch": 4, "optim.lr": 0.0015, "optim.embedding_lr": 0.04, "warm-up": 0.04}
# Changes to configs/quickstart.yaml. "warm-up" is a share of the steps, "init" the kind of attention's initial weights: normal, or ours,
# which copy. docs/race.md has the sources and the rule for the batch.
RECIPES: dict[str, dict] = {
    "series": UNTUNED | {"optim.decay_fraction": 0, "warm-up": 0.033},
    "litgpt": COSINE | {"model.init_std": 0.056, "warm-up": 0.0135},
    "minimind": COSINE | {"optim.min_lr_ratio": 0.1, "optim.weight_decay": 0.01, "optim.betas": "[0.9,0.999]", "warm-up": 0},
    "adamw": TUNED | {"init": "normal"},
    "adamw+init": TUNED | {"init": "ours"},
    OURS: {"train.global_batch": 4, "warm-up": 0.04, "init": "ours"},
}
COLORS = dict(zip(RECIPES, (GREY, GREEN, PURPLE, SKY, BLUE, RED), strict=True))


@dataclass(frozen=True)
class Text:
    """The text of a race."""

    folder: Path
    split: Split
    validation: Split
    characters: int  # that a run with share 1 reads


def parts_of(run: str) -> tuple[str, float, dict[str, str]]:
    """(recipe, share of the characters, changes) of a run such as "adamw@0.5 optim.lr=0.004"."""
    (name, _, share), *changes = run.split()[0].partition("@"), *run.split()[1:]
    if name not in RECIPES:
        raise UserError(f"the recipe {name!r} is unknown; choose one of {', '.join(RECIPES)}")
    return name, float(share or 1), dict(change.split("=") for change in changes)


def config_of(run: str, seed: int, text: Text, preset: str) -> tuple[RunConfig, str]:
    """The config of a run, and its initial weights. Its number of steps follows from its share of the race's characters."""
    name, share, changes = parts_of(run)
    keys = {"model.preset": preset} | RECIPES[name] | changes
    init, batch = keys.pop("init"), int(keys["train.global_batch"])
    context = parse(["--model.preset", preset]).shape(None).context
    steps = max(2, round(share * text.characters / (batch * context * text.split.characters / text.split.n_tokens)))
    keys |= {"train.max_steps": steps, "optim.warmup_steps": min(steps - 1, round(float(keys.pop("warm-up")) * steps))}
    keys |= {"train.micro_batch": math.gcd(8, batch), "seed": seed, "data.source": text.folder, "out_dir": text.folder}
    return parse([f"--{key}={value}" for key, value in keys.items()], prog="bench.race"), init


def batches_of(config: RunConfig, text: Text, context: int) -> Batches:
    sizes = {"context": context, "micro_batch": config.train.micro_batch, "global_batch": config.train.global_batch}
    return Batches(text.split, **sizes, seed=config.seed, document_mask=config.data.document_mask)


@torch.no_grad()
def reset_attention(model: GPT) -> None:
    """Normal initial weights of attention, as in GPT-2, in place of ours (`GPT.reset_parameters`)."""
    for block in model.blocks:
        nn.init.normal_(block.qkv.weight, std=model.config.init_std)
        nn.init.normal_(block.attention_out.weight, std=model.config.init_std / (2 * model.config.n_layer) ** 0.5)


def train(config: RunConfig, init: str, text: Text, here: processes.Processes, device: DeviceFacts, update: Callable) -> dict:
    """Train and validate: the figures of a run."""
    planned = plan(config, DataFacts.of(text.split), device)
    step, batches, n_steps = TrainingStep(planned, here), batches_of(config, text, planned.sequence), config.train.max_steps
    if init == "normal":
        reset_attention(step.model)
    for i in range(n_steps):
        step.run(batches.step(i), step.lr_factor(i), i, n_targets=batches.n_targets(i))
        update(i + 1, loss=step.mean_loss() if (i + 1) % max(1, n_steps // 8) == 0 else None)
    step.check_finite(n_steps)
    options = {"context": planned.sequence, "micro_batch": 8, "document_mask": config.data.document_mask, "autocast": step.autocast}
    _, bits = validate(step.whole_model(ema=bool(config.train.ema)), text.validation, **options)
    n_tokens = n_steps * planned.tokens_per_step
    characters = round(n_tokens * text.split.characters / text.split.n_tokens)
    return {"bits": bits, "characters": characters, "steps": n_steps, "epochs": n_tokens / text.split.n_tokens}


def step_seconds(configs: list[RunConfig], text: Text, here: processes.Processes, device: DeviceFacts, rounds: int = 15) -> list[float]:
    """The median seconds of a step of each config; they take turns. On a CPU these are seconds of CPU time over all threads, which other
    work on the machine changes little."""
    clock = time.process_time if here.device.type == "cpu" else time.perf_counter
    plans = [plan(c, DataFacts.of(text.split), device) for c in configs]
    steps, streams = [TrainingStep(p, here) for p in plans], [batches_of(p.config, text, p.sequence) for p in plans]
    seconds = [[] for _ in configs]
    for i in range(rounds + 3):
        for step, stream, mine in zip(steps, streams, seconds, strict=True):
            start = clock()
            step.run(stream.step(i), step.lr_factor(i), i)
            processes.synchronize(here.device)
            mine.append(clock() - start)
    return [statistics.median(mine[3:]) for mine in seconds]  # the first compile


def race(args: argparse.Namespace) -> None:
    """Train the runs that the results lack, or measure their steps, and append the results."""
    folder = args.data or ROOT / "out/race/stories"
    if not args.data:
        write_built_in(folder, seed=42, stories=12_000, validation_stories=400, vocab_size=4096)
    _, split, validation = open_data(folder)
    text, here = Text(folder, split, validation, args.characters), processes.start()
    configs = {(run, seed): config_of(run, seed, text, args.preset) for run in args.runs for seed in args.seeds}
    device = DeviceFacts.of(here, next(iter(configs.values()))[0])
    common = {"text": args.name or folder.name, "preset": args.preset}
    if args.times:
        seconds = step_seconds([configs[run, args.seeds[0]][0] for run in args.runs], text, here, device)
        add(args.results, *(common | {"run": run, "step_seconds": s} for run, s in zip(args.runs, seconds, strict=True)))
        return
    known = {(r["text"], r["preset"], r["run"], r.get("seed"), r.get("steps")) for r in read(args.results)}
    for n, ((run, seed), (config, init)) in enumerate(configs.items(), 1):
        if (*common.values(), run, seed, config.train.max_steps) in known:
            continue
        log = Log(config, is_main=True)
        log.print(f"{n} of {len(configs)}: {run}, seed {seed}")
        with explain_errors(config), log.progress(config.train.max_steps) as update:
            row = train(config, init, text, here, device, update)
        add(args.results, common | {"run": run, "seed": seed} | row)
        log.print(f"{row['bits']:.4f} bits per character")


# ---- the results ------------------------------------------------------------------------------------------------------------------------


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def add(file: Path, *rows: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True)
class Result:
    """A run with all its seeds."""

    recipe: str
    share: float
    changes: str
    characters: int
    steps: int
    bits: list[float]  # of the seeds
    seconds: float  # steps × seconds of a step; NaN if they were not measured

    @property
    def mean(self) -> float:
        return statistics.mean(self.bits)

    @property
    def spread(self) -> str:
        return f"{self.mean:.3f}" + (f" ({min(self.bits):.3f}–{max(self.bits):.3f})" if len(self.bits) > 1 else "")


def results_of(rows: list[dict]) -> list[Result]:
    """The results of one text, in the order of RECIPES, each by rising share."""
    a_step = {r["run"]: r["step_seconds"] for r in rows if "step_seconds" in r}
    results = []
    for (run, steps), mine in grouped([r for r in rows if "bits" in r], "run", "steps").items():
        name, share, changes = parts_of(run)
        text = " ".join(f"{k}={v}" for k, v in changes.items())
        seconds = steps * a_step.get(f"{name} {text}".strip(), math.nan)
        results.append(Result(name, share, text, mine[0]["characters"], steps, [r["bits"] for r in mine], seconds))
    return sorted(results, key=lambda r: ([*RECIPES].index(r.recipe), r.share))


def tables(rows: list[dict]) -> str:
    """The Markdown of a text: the race, the share of the characters with which ours reaches each figure, and the sweeps."""
    results = results_of(rows)
    finals = [r for r in results if not r.changes]
    race = Table("", ["recipe", "share", "characters", "steps", "seeds", "bits per character", "CPU seconds"])
    reached = Table("", ["recipe", "ours reaches its mean with characters", "CPU seconds", "with every seed its best"])
    for r in finals:
        seconds = "" if math.isnan(r.seconds) else f"{r.seconds:,.0f}"
        race.lines.append([r.recipe, f"{r.share:g}", f"{r.characters:,}", f"{r.steps:,}", str(len(r.bits)), r.spread, seconds])
        if r.recipe != OURS:
            first = next((o for o in finals if o.recipe == OURS and o.mean <= r.mean), None)
            cells = ["not reached", "", ""]
            if first:
                seconds = "" if math.isnan(first.seconds / r.seconds) else times(first.seconds / r.seconds)
                cells = [times(first.characters / r.characters), seconds, "yes" if max(first.bits) <= min(r.bits) else "no"]
            reached.lines.append([r.recipe, *cells])
    sweep = Table("", ["recipe", "share", "changed", "bits per character"])
    for r in sorted((r for r in results if r.changes), key=lambda r: (r.recipe, r.share, r.mean)):
        sweep.lines.append([r.recipe, f"{r.share:g}", f"`{r.changes}`", r.spread])
    return "\n".join(t.markdown() for t in (race, reached, sweep) if t.lines)


def chart(rows: list[dict], path: Path) -> None:
    """Draw the bits per character over the share of the characters: a panel for each text, a point for each seed."""
    groups = grouped(rows, "text", "preset")
    figure, axes = new_figure(1, len(groups), (5.2 * len(groups), 4.4))
    for axis, ((text, preset), mine) in zip(axes[0], groups.items(), strict=True):
        finals = [r for r in results_of(mine) if not r.changes]
        for name in distinct([{"recipe": r.recipe} for r in finals], "recipe"):
            shown, color = [r for r in finals if r.recipe == name], COLORS[name]
            axis.plot([r.share for r in shown], [r.mean for r in shown], color=color, lw=2.2 if name == OURS else 1.4, label=name)
            for r in shown:
                axis.plot([r.share] * len(r.bits), r.bits, "o", ms=5, mew=0, alpha=0.7, color=color)
            if name != OURS:
                axis.axhline(shown[-1].mean, lw=1, ls=(0, (4, 3)), color=color, zorder=0)
        axis.set_title(f"{text}, {preset}")
        axis.set_xlim(0, 1.05)
        axis.set_xlabel("characters read, relative to the rivals'")
        axis.set_ylabel("validation, bits per character")
        axis.grid(axis="y", color="#e6e6e6", lw=0.8)
        axis.set_axisbelow(True)
    handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.race", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f'"RECIPE[@SHARE] [KEY=VALUE …]"; recipes: {", ".join(RECIPES)}')
    parser.add_argument("--data", type=Path, help="folder of tritale prepare; the quick start's stories if not given")
    parser.add_argument("--name", help="of the text in the results; the folder's name if not given")
    parser.add_argument("--characters", type=int, default=550_000, help="that a run with share 1 reads")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--preset", default="quickstart", help="of the model")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/race.jsonl")
    parser.add_argument("--times", action="store_true", help="measure the seconds of a step of these runs in place of training them")
    parser.add_argument("--report", action="store_true", help="write the tables and the chart of docs/race.md")
    args = parser.parse_args()
    if args.runs:
        race(args)
    if args.report:
        rows = read(args.results)
        chart(rows, ROOT / "docs/race.png")
        parts = [f"## {text}, {preset}\n\n{tables(mine)}" for (text, preset), mine in grouped(rows, "text", "preset").items()]
        write_between_markers(ROOT / "docs/race.md", "\n" + "\n".join(parts) + "\n", BEGIN)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"bench.race: {sentence(error)}")
