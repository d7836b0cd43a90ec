"""A results file → tables in Markdown and charts: python -m bench.report bench/results/MACHINE.json

Writes docs/bench/MACHINE.md and docs/bench/MACHINE-{speed,memory,training-step,scaling}.png, and with --pages also puts the
training-step table and what is slower than a peer between the markers of docs/bench.md and of the README's section.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table as RichTable

ROOT = Path(__file__).parents[1]
# Pages with a place for the summary, and the folder of their pictures as seen from README.md's place or from docs/.
PAGES = {"docs/bench.md": "bench", "docs/bench-readme.md": "docs/bench", "README.md": "docs/bench", "README.zh.md": "docs/bench"}
BEGIN, END = "<!-- measured: python -m bench.report FILE --pages -->", "<!-- end of measured -->"
LEFT = {"model", "shape", "implementation", "trainer", "note", "switched off", "axis"}
PASSES = ("forward", "backward", "both")
# Okabe and Ito's colours, told apart by colour-blind readers; ours is the one warm and dark.
GREY, SKY, BLUE, GREEN, YELLOW, PURPLE, ORANGE, RED = "#9a9a9a #56b4e9 #0072b2 #009e73 #e0c000 #cc79a7 #e69f00 #d55e00".split()
COLORS = {
    "reference": GREY, "reference, eager": GREY, "reference, compiled": SKY, "ours": RED, "ours, recompute": ORANGE, "SDPA": BLUE,
    "F.rms_norm": BLUE, "F.cross_entropy": BLUE, "F.linear_cross_entropy, 256 rows": BLUE,
    "F.linear_cross_entropy, default options": "#7fb2d8", "F.linear_cross_entropy, no options": "#b5d4e9",
    "cut-cross-entropy": GREEN, "Liger-Kernel": PURPLE, "flash-attn": YELLOW, "litgpt": GREEN, "transformers Mistral": BLUE,
    "transformers Mistral, eager": "#7fb2d8",
}  # fmt: skip


@dataclass
class Table:
    """A table for the terminal and for Markdown."""

    title: str
    columns: list[str]
    lines: list[list[str]] = field(default_factory=list)
    note: str = ""

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, caption=self.note or None, title_justify="left", caption_justify="left")
        for column in self.columns:
            table.add_column(column, justify="left" if column in LEFT else "right", overflow="fold")
        for line in self.lines:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        rules = ["---" if c in LEFT else "---:" for c in self.columns]
        body = "".join(f"| {' | '.join(line)} |\n" for line in (self.columns, rules, *self.lines))
        return f"### {self.title}\n\n{body}" + (f"\n{self.note}\n" if self.note else "")


# ---- numbers as text --------------------------------------------------------------------------------------------------------------------


def digits(x: float) -> str:
    """Three significant digits, no exponent."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def milliseconds(seconds: dict) -> str:
    return digits(1000 * seconds["median"])


def spread_of(seconds: dict) -> str:
    """How far the rounds lie from their median: −fastest +slowest."""
    m = seconds["median"]
    return f"−{1 - seconds['low'] / m:.0%} +{seconds['high'] / m - 1:.0%} of {seconds['rounds']}"


def times(x: float) -> str:
    return f"{x:.2f} ×"


def mebibytes(n: float) -> str:
    return f"{n / 2**20:,.0f}" if n >= 10 * 2**20 else f"{n / 2**20:.1f}"


def rate_of(row: dict) -> str:
    if not row.get("rate"):
        return ""
    return f"{row['rate'] / 1e9:,.0f} {'GB/s' if row['unit'] == 'B/s' else 'GFLOP/s'} ({row['share']:.0%})"


def note(row: dict) -> str:
    return {"wrong": "WRONG: ", "failed": "FAILED: "}.get(row["status"], "") + row["note"]


def tokens_per_second(row: dict) -> float:
    return row["tokens"] / row["seconds"]["median"]


# ---- tables -----------------------------------------------------------------------------------------------------------------------------


def of_suite(rows: list[dict], suite: str) -> list[dict]:
    return [r for r in rows if r["suite"] == suite]


def distinct(rows: list[dict], *keys: str) -> list[tuple]:
    return list(dict.fromkeys(tuple(r.get(k) for k in keys) for r in rows))


def op_tables(rows: list[dict]) -> list[Table]:
    result = []
    columns = [
        "model",
        "shape",
        "implementation",
        "forward ms",
        "backward ms",
        "both ms",
        "rounds",
        "speed",
        "of the machine",
        "peak MiB",
        "memory",
    ]
    for (op,) in distinct(of_suite(rows, "ops"), "case"):
        table = Table(f"{op}", [*columns, "note"])
        mine = [r for r in of_suite(rows, "ops") if r["case"] == op]
        for model, dtype, contender in distinct(mine, "model", "dtype", "contender"):
            found = {r["pass"]: r for r in mine if (r["model"], r["dtype"], r["contender"]) == (model, dtype, contender)}
            any_row = next(iter(found.values()))
            if any_row["status"] != "ok":
                table.lines.append([model, any_row.get("sizes", ""), contender, *[""] * (len(columns) - 3), note(any_row)])
                continue
            base = {
                r["pass"]: r
                for r in mine
                if (r["model"], r["dtype"], r["contender"]) == (model, dtype, "reference") and r["status"] == "ok"
            }
            both, ms = found.get("both"), [milliseconds(found[p]["seconds"]) if p in found else "" for p in PASSES]
            rest = [""] * 5
            if both:
                speed = times(base["both"]["seconds"]["median"] / both["seconds"]["median"]) if "both" in base else ""
                memory = ratio(both["bytes"], base["both"]["bytes"]) if "both" in base else ""
                rest = [spread_of(both["seconds"]), speed, rate_of(both), mebibytes(both["bytes"]), memory]
            table.lines.append([model, f"{any_row['sizes']}, {dtype}", contender, *ms, *rest, note(any_row)])
        result.append(table)
    if result:
        result[-1].note = (
            "speed: of forward and backward, over the reference's; memory: peak beyond the inputs, over the reference's; rounds: spread "
            "about the median; of the machine: beside the bytes/s of a plain copy or the FLOP/s of a matrix product."
        )
    return result


def ratio(a: float, b: float) -> str:
    return times(a / b) if b else ""


def step_tables(rows: list[dict]) -> list[Table]:
    result = []
    steps = of_suite(rows, "training step")
    for (model,) in distinct(steps, "model"):
        mine = [r for r in steps if r["model"] == model]
        base = next((r for r in mine if r["contender"] == "reference, eager" and r["status"] == "ok"), None)
        trainers = Table(f"Training step: {model}", ["trainer", "tokens/s", "rounds", "speed", "peak MiB", "memory", "first loss", "note"])
        off = Table(f"Ablation: {model}", ["switched off", "speed", "peak MiB", "memory", "note"])
        ours = next((r for r in mine if r["contender"] == "ours" and r["status"] == "ok"), None)
        for r in mine:
            is_ablation = r["contender"].startswith("ours without ")
            name = r["contender"].removeprefix("ours without ") if is_ablation else r["contender"]
            if r["status"] != "ok":
                (off if is_ablation else trainers).lines.append([name, *[""] * (3 if is_ablation else 6), note(r)])
                continue
            if is_ablation:
                speed = times(r["ours_beside_it"]["median"] / r["seconds"]["median"]) if "ours_beside_it" in r else ""
                off.lines.append([name, speed, mebibytes(r["bytes"]), ratio(r["bytes"], ours["bytes"]) if ours else "", note(r)])
                continue
            speed, memory = (times(tokens_per_second(r) / tokens_per_second(base)), ratio(r["bytes"], base["bytes"])) if base else ("", "")
            rate, loss = f"{tokens_per_second(r):,.0f}", f"{r['loss']:.5f}"
            trainers.lines.append([name, rate, spread_of(r["seconds"]), speed, mebibytes(r["bytes"]), memory, loss, note(r)])
        measured = next((r for r in mine if r["status"] == "ok"), None)
        if measured:
            trainers.note = (
                f"{measured['tokens']:,} tokens a step, {measured['parameters'] / 1e6:.1f} M parameters, {measured['dtype']}; "
                "compiled where not eager; peak memory of the process, less what it held before it built the model; the first loss is "
                "in fp32, of weights larger than those of a training."
            )
        off.note = "ours with this one op as the reference, over ours timed in turns with it."
        result += [t for t in (trainers, off) if t.lines]
    return result


def scaling_tables(rows: list[dict]) -> list[Table]:
    result = []
    for (axis,) in distinct(of_suite(rows, "scaling"), "case"):
        mine = [r for r in of_suite(rows, "scaling") if r["case"] == axis]
        names = [name for (name,) in distinct(mine, "contender")]
        table = Table(f"Scaling over the {axis}", [axis, *(f"{n} {what}" for what in ("tokens/s", "MiB") for n in names), "note"])
        for (value,) in distinct(mine, "value"):
            found = {r["contender"]: r for r in mine if r["value"] == value}
            ok = {n: r for n, r in found.items() if r["status"] == "ok"}
            speeds = [f"{tokens_per_second(ok[n]):,.0f}" if n in ok else "" for n in names]
            memory = [mebibytes(ok[n]["bytes"]) if n in ok else "" for n in names]
            table.lines.append([f"{value:,}", *speeds, *memory, "; ".join(f"{n}: {note(r)}" for n, r in found.items() if note(r))])
        table.note = "Training steps without torch.compile."
        result.append(table)
    return result


def generation_tables(rows: list[dict]) -> list[Table]:
    result = []
    for (model,) in distinct(of_suite(rows, "generation"), "model"):
        mine = [r for r in of_suite(rows, "generation") if r["model"] == model]
        table = Table(f"Generation: {model}", ["implementation", "dtype", "tokens/s", "rounds", "ours is", "note"])
        for r in mine:
            if r["status"] != "ok":
                table.lines.append([r["contender"], r["dtype"], "", "", "", note(r)])
                continue
            ours = next((o for o in mine if (o["contender"], o["dtype"], o["status"]) == ("ours", r["dtype"], "ok")), r)
            faster = times(tokens_per_second(ours) / tokens_per_second(r)) if r is not ours else ""
            table.lines.append([r["contender"], r["dtype"], f"{tokens_per_second(r):,.0f}", spread_of(r["seconds"]), faster, note(r)])
        table.note = (
            "microstories-44m with random weights, greedy, 100 new tokens for each prompt, on the CPU; "
            "ours multiplies bf16 weights in fp32."
        )
        result.append(table)
    return result


def tables(rows: list[dict]) -> list[Table]:
    return op_tables(rows) + step_tables(rows) + scaling_tables(rows) + generation_tables(rows)


def slower_than_peers(rows: list[dict], margin: float = 0.03) -> list[str]:
    """One line for every case in which another implementation is faster or smaller than ours, by more than `margin`, after one that says
    what was compared. An op that on a CPU is its definition has that one said once: it is what "reference, compiled" compiles."""
    lines, compiled, n_compared = [], {}, 0
    ok = [r for r in rows if r["status"] == "ok" and r.get("pass", "both") == "both"]
    keys = "suite", "case", "model", "value", "dtype"
    for suite, op, model, value, dtype in distinct(ok, *keys):
        group = {r["contender"]: r for r in ok if tuple(r.get(k) for k in keys) == (suite, op, model, value, dtype)}
        ours = group.get("ours")
        others = {n: r for n, r in group.items() if not n.startswith("ours")}
        if ours is None:
            continue
        n_compared += len(others)
        per_token = lambda r: r["seconds"]["median"] / r.get("tokens", 1)
        faster = {n: per_token(ours) / per_token(r) for n, r in others.items()}
        smaller = {n: r["bytes"] / ours["bytes"] for n, r in others.items() if ours["bytes"]}
        if ours.get("is_definition"):
            if "reference, compiled" in faster:
                compiled.setdefault(op, []).append(faster["reference, compiled"])
            for n in ("reference", "reference, compiled"):
                faster.pop(n, None), smaller.pop(n, None)
        parts = [f"{n} is {x:.2f} × as fast" for n, x in faster.items() if x > 1 + margin]
        parts += [f"{n} needs {x:.2f} × the memory" for n, x in smaller.items() if x < 1 - margin]
        if parts:
            where = {"ops": f"{op}, {model}", "scaling": f"scaling, {op} {value}"}.get(suite, f"{suite}, {model}")
            lines.append(f"- {where}, {dtype}: {'; '.join(parts)}.")
    if compiled:
        spans = ", ".join(f"{op} {min(v):.1f}–{max(v):.1f} ×" for op, v in compiled.items())
        lines.append(
            "- On a CPU these ops of ours are their definition, meant to be compiled with the model around them; alone and uncompiled they "
            f"take this many times as long as compiled: {spans}."
        )
    missing = len(distinct([r for r in rows if r["status"] != "ok"], *keys, "contender"))
    head = f"{n_compared} times another was compared with ours, {missing} times it was not (its line in the tables says why). "
    return [f"{head}By more than {margin:.0%}:\n", *(lines or ["- nothing is faster or smaller than ours."])]


def markdown(machine: dict, rows: list[dict], images: list[str]) -> str:
    about = f"{machine['name']} ({machine['simd']}, 16-bit products: {machine['half_precision'] or 'none, so fp32'}), "
    about += f"PyTorch {machine['torch']}, "
    about += f"commit {machine['commit']}, {machine['date']}, {machine['seconds'] / 60:.0f} minutes: `pytest bench --benchmark`."
    if machine["device"] == "cpu":
        about += " On a CPU *ours* is what `tritale.kernels` runs there, PyTorch code and not the Triton kernels, and the tokens are cut."
    pictures = "\n".join(f"![{name}]({name})\n" for name in images)
    slower = "\n".join(slower_than_peers(rows))
    parts = [f"# Benchmarks: {machine['name']}\n\n{about}\n\n{pictures}", f"## Where another is faster or smaller than ours\n\n{slower}\n"]
    parts += ["## Ops\n", *(t.markdown() for t in op_tables(rows))]
    parts += ["## Training step\n", *(t.markdown() for t in step_tables(rows))]
    parts += ["## Scaling\n", *(t.markdown() for t in scaling_tables(rows))]
    parts += ["## Generation\n", *(t.markdown() for t in generation_tables(rows))]
    return "\n".join(parts)


def summary(machine: dict, rows: list[dict], folder: str, is_short: bool) -> str:
    """The training step, generation, and where another is faster or smaller than ours; `is_short`: without the other ops."""
    head = f"{machine['name']}, PyTorch {machine['torch']}, commit {machine['commit']}, {machine['date']}, `pytest bench --benchmark`."
    picture = f"![Tokens per second and memory of a training step]({folder}/{machine['slug']}-training-step.png)"
    slower = slower_than_peers(rows)
    if is_short:
        shown = ("- training step", "- linear_cross_entropy", "- generation")
        lines = [line for line in slower if line.startswith(shown)]
        slower = lines or ["- nothing in the training step, the fused loss or generation; the rest is in the full tables."]
    shown = step_tables(rows) + generation_tables(rows)
    steps = "\n".join(t.markdown() for t in shown if not (is_short and t.title.startswith("Ablation")))
    return "\n\n".join([head, picture, steps, "### Where another is faster or smaller than ours", "\n".join(slower)]) + "\n"


# ---- charts -----------------------------------------------------------------------------------------------------------------------------


def style():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titleweight": "bold",
        "axes.titlesize": 11, "figure.facecolor": "white", "savefig.dpi": 150, "axes.edgecolor": "#888888", "xtick.color": "#444444",
        "ytick.color": "#222222", "legend.frameon": False,
    })  # fmt: skip
    return plt


def bars(axis, names: list[str], values: list[float], labels: list[str], colors: list[str], is_reference: bool = True) -> None:
    """Horizontal bars with their values beside them, and a line at 1 where they are over the reference's."""
    positions = range(len(names))
    axis.barh(positions, values, color=colors, height=0.72)
    top = max([*values, 1.0] if is_reference else values)
    for y, (value, label) in enumerate(zip(values, labels, strict=True)):
        axis.text(
            value + 0.015 * top,
            y,
            label,
            va="center",
            fontsize=8.5,
            color="#222222",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    axis.set_yticks(positions, names)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, top * 1.22)
    if is_reference:
        axis.axvline(1, color="#555555", lw=0.8, ls=(0, (4, 3)), zorder=0)


def chart_ops(rows: list[dict], what: str, file: Path, about: str) -> None:
    """A row of panels for each op, a panel for each model; speed or memory over the reference's."""
    plt = style()
    ok = [r for r in of_suite(rows, "ops") if r["status"] == "ok" and r["pass"] == "both"]
    dtype = ok[0]["dtype"]
    ok = [r for r in ok if r["dtype"] == dtype]
    cases = [c for (c,) in distinct(ok, "case")]
    models = sorted({r["model"] for r in ok}, key=["tiny", "44m", "124m", "1b"].index)
    groups = {key: [r for r in ok if (r["case"], r["model"]) == key] for key in ((c, m) for c in cases for m in models)}
    heights = [max(len(groups[c, m]) for m in models) for c in cases]
    size = (4.1 * len(models) + 1.6, 0.27 * sum(heights) + 0.62 * len(cases) + 0.9)
    figure, axes = plt.subplots(len(cases), len(models), figsize=size, squeeze=False, height_ratios=heights, layout="constrained")
    for line, case in zip(axes, cases, strict=True):
        for axis, model in zip(line, models, strict=True):
            group = groups[case, model]
            base = next((r for r in group if r["contender"] == "reference"), None)
            if base is None or not base["bytes"]:
                axis.set_axis_off()
                continue
            value = {
                "speed": lambda r, base=base: base["seconds"]["median"] / r["seconds"]["median"],
                "memory": lambda r, base=base: r["bytes"] / base["bytes"],
            }[what]
            values = [value(r) for r in group]
            suffix = lambda r: f"{milliseconds(r['seconds'])} ms" if what == "speed" else f"{mebibytes(r['bytes'])} MiB"
            labels = [f"{times(v)}   {suffix(r)}" for v, r in zip(values, group, strict=True)]
            names = [r["contender"].replace("F.linear_cross_entropy, ", "F.linear_c._e., ") for r in group]
            bars(axis, names if model == models[0] else [""] * len(group), values, labels, [COLORS[r["contender"]] for r in group])
            axis.set_xlim(0, max([*values, 1.0]) * 1.55)
            axis.set_title(f"{case} · {model}" if model == models[0] else model)
            axis.set_xticks([])
            axis.spines["bottom"].set_visible(False)
    title = {"speed": "Speed over the reference (longer is faster)", "memory": "Peak memory over the reference (shorter is smaller)"}[what]
    figure.suptitle(f"{title}, forward and backward, {dtype}\n{about}", x=0.01, ha="left", fontsize=12)
    figure.savefig(file)
    plt.close(figure)


def chart_training_step(rows: list[dict], file: Path, about: str) -> None:
    plt = style()
    ok = [r for r in of_suite(rows, "training step") if r["status"] == "ok" and not r["contender"].startswith("ours without")]
    models = [m for (m,) in distinct(ok, "model")]
    count = max(sum(r["model"] == m for r in ok) for m in models)
    figure, axes = plt.subplots(
        len(models), 2, figsize=(11, (0.36 * count + 0.75) * len(models) + 0.7), squeeze=False, layout="constrained"
    )
    for line, model in zip(axes, models, strict=True):
        group = [r for r in ok if r["model"] == model]
        base = next((r for r in group if r["contender"] == "reference, eager"), group[0])
        names = [r["contender"] if r["contender"].endswith("eager") else f"{r['contender']}, compiled" for r in group]
        colors = [COLORS[r["contender"]] if r["contender"] != "reference" else SKY for r in group]
        speeds, sizes = [tokens_per_second(r) for r in group], [r["bytes"] / 2**20 for r in group]
        labels = [f"{s:,.0f}   {times(s / tokens_per_second(base))}" for s in speeds]
        bars(line[0], names, speeds, labels, colors, is_reference=False)
        line[0].set_title(f"{model}: tokens/s")
        bars(
            line[1], [""] * len(group), sizes, [f"{s:,.0f}   {times(s * 2**20 / base['bytes'])}" for s in sizes], colors, is_reference=False
        )
        line[1].set_title("peak MiB")
        for axis in line:
            axis.set_xlim(0, axis.get_xlim()[1] * 1.08)
            axis.set_xticks([])
            axis.spines["bottom"].set_visible(False)
    tokens = ok[0]["tokens"]
    figure.suptitle(f"A whole training step of {tokens:,} tokens, {ok[0]['dtype']}\n{about}", x=0.01, ha="left", fontsize=12)
    figure.savefig(file)
    plt.close(figure)


def chart_scaling(rows: list[dict], file: Path, about: str) -> None:
    plt = style()
    ok = [r for r in of_suite(rows, "scaling") if r["status"] == "ok"]
    axes_names = [a for (a,) in distinct(ok, "case")]
    names = [n for (n,) in distinct(ok, "contender")]
    figure, axes = plt.subplots(2, len(axes_names), figsize=(max(8.0, 3.9 * len(axes_names)), 6.4), squeeze=False, layout="constrained")
    for column, name in enumerate(axes_names):
        mine = [r for r in ok if r["case"] == name]
        values = [v for (v,) in distinct(mine, "value")]
        for line, (what, of) in enumerate({"tokens/s": tokens_per_second, "peak MiB": lambda r: r["bytes"] / 2**20}.items()):
            axis = axes[line][column]
            for contender, marker in zip(names, "os^Dv", strict=False):
                points = [(r["value"], of(r)) for r in mine if r["contender"] == contender]
                width = 2.4 if contender == "ours" else 1.6
                axis.plot(*zip(*points, strict=True), marker=marker, ms=5, lw=width, color=COLORS[contender], label=contender)
            axis.set_xscale("log", base=2)
            axis.set_xticks(values, [f"{v:,}" if v < 10_000 else f"{v / 1024:.0f} k" for v in values])
            axis.minorticks_off()
            axis.set_ylim(0, 1.06 * max(of(r) for r in mine))
            axis.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
            axis.grid(axis="y", color="#e6e6e6", lw=0.8)
            axis.set_axisbelow(True)
            axis.set_title(f"{what} over the {name}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.suptitle(f"Training steps, not compiled\n{about}", x=0.01, ha="left", fontsize=12)
    figure.savefig(file)
    plt.close(figure)


def charts(machine: dict, rows: list[dict], folder: Path) -> list[str]:
    """Names of the PNGs drawn: those that the results have figures for."""
    about = f"{machine['name']}, PyTorch {machine['torch']}, commit {machine['commit']}"
    drawn = []
    for suite, name, draw in (
        ("training step", "training-step", chart_training_step),
        ("ops", "speed", lambda rows, file, about: chart_ops(rows, "speed", file, about)),
        ("ops", "memory", lambda rows, file, about: chart_ops(rows, "memory", file, about)),
        ("scaling", "scaling", chart_scaling),
    ):
        if any(r["status"] == "ok" and r.get("pass", "both") == "both" for r in of_suite(rows, suite)):
            drawn.append(f"{machine['slug']}-{name}.png")
            draw(rows, folder / drawn[-1], about)
    return drawn


def read_results(file: Path) -> tuple[dict, list[dict]]:
    """Raises FileNotFoundError or ValueError where the file is none of `pytest bench --benchmark`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; measure with: pytest bench --benchmark")
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        return read["machine"], read["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no results file of pytest bench --benchmark ({error}); choose one of bench/results/") from error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="bench/results/MACHINE.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/bench")
    parser.add_argument("--pages", action="store_true", help="also write the summary between the markers of docs/bench.md and the README")
    a = parser.parse_args()
    try:
        machine, rows = read_results(a.results)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"bench.report: {error}")
    a.out.mkdir(parents=True, exist_ok=True)
    images = charts(machine, rows, a.out)
    page = a.out / f"{machine['slug']}.md"
    page.write_text(markdown(machine, rows, images), encoding="utf-8")
    print("\n".join(f"written: {a.out / name}" for name in [page.name, *images]))
    if a.pages:
        for name, folder in PAGES.items():
            before, marker, rest = (ROOT / name).read_text(encoding="utf-8").partition(BEGIN) if (ROOT / name).is_file() else ("", "", "")
            if marker:
                body = summary(machine, rows, folder, is_short=name != "docs/bench.md")
                (ROOT / name).write_text(f"{before}{BEGIN}\n{body}{END}{rest.partition(END)[2]}", encoding="utf-8")
                print(f"written: {ROOT / name}")


if __name__ == "__main__":
    main()
