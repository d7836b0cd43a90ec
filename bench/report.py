"""Turn a results file into Markdown tables and charts: python -m bench.report bench/results/MACHINE.json

Writes docs/bench/MACHINE.md and docs/bench/MACHINE-{speed,memory,training-step,scaling}.png. With --pages, also writes a summary between
the markers of docs/bench.md, and a short table between those of README.md and README.zh.md.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table as RichTable

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured: python -m bench.report FILE --pages -->", "<!-- end of measured -->"
LEFT = {"model", "shape", "implementation", "trainer", "recipe", "changed", "note", "switched off", "axis"}
LEFT |= {"tokens per second", "每秒 token 数"}
OPS_NOTE = (
    "speed: forward and backward, relative to the reference; memory: peak beyond the inputs, relative to the reference; rounds: fastest "
    "and slowest, relative to the median; of the machine: share of a plain copy's bytes/s or of a matrix product's FLOP/s."
)
PASSES = ("forward", "backward", "both")
WITHOUT = "ours without "  # begins the name of an ablation
# Okabe and Ito's colours, which colour-blind readers can tell apart. Ours is the dark warm one.
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

    def add(self, cells: list[str], note: str = "") -> None:
        """Add a line whose last cell is the note; the cells between are empty."""
        self.lines.append([*cells, *[""] * (len(self.columns) - 1 - len(cells)), note])

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
        return (f"### {self.title}\n\n" if self.title else "") + body + (f"\n{self.note}\n" if self.note else "")


# ---- numbers as text --------------------------------------------------------------------------------------------------------------------


def digits(x: float) -> str:
    """Three significant digits, no exponent."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def milliseconds(row: dict) -> str:
    return digits(1000 * row["seconds"]["median"])


def spread_of(row: dict) -> str:
    """The fastest and the slowest round, relative to the median."""
    seconds, m = row["seconds"], row["seconds"]["median"]
    return f"−{1 - seconds['low'] / m:.0%} +{seconds['high'] / m - 1:.0%} of {seconds['rounds']}"


def times(x: float) -> str:
    return f"{x:.2f} ×"


def ratio(a: float, b: float) -> str:
    return times(a / b) if b else ""


def mebibytes(n: float) -> str:
    return f"{n / 2**20:,.0f}" if n >= 10 * 2**20 else f"{n / 2**20:.1f}"


def rate_of(row: dict) -> str:
    if not row.get("rate"):
        return ""
    return f"{row['rate'] / 1e9:,.0f} {'GB/s' if row['unit'] == 'B/s' else 'GFLOP/s'} ({row['share']:.0%})"


def note(row: dict) -> str:
    return {"wrong": "WRONG: ", "failed": "FAILED: "}.get(row["status"], "") + row["note"]


def per_token(row: dict) -> float:
    """Seconds, for each token if the row counts tokens."""
    return row["seconds"]["median"] / row.get("tokens", 1)


def tokens_per_second(row: dict) -> float:
    return 1 / per_token(row)


# ---- tables -----------------------------------------------------------------------------------------------------------------------------


def of_suite(rows: list[dict], suite: str) -> list[dict]:
    return [r for r in rows if r["suite"] == suite]


def grouped(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """{values of the keys: rows that have them}, in the order of the rows."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(k) for k in keys), []).append(row)
    return groups


def distinct(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(r[key] for r in rows))


def find(rows: list[dict], **wanted) -> dict | None:
    """The first row that is ok and has these values."""
    return next((r for r in rows if r["status"] == "ok" and all(r.get(k) == v for k, v in wanted.items())), None)


def op_tables(op: str, rows: list[dict]) -> list[Table]:
    columns = ["model", "shape", "implementation", "forward ms", "backward ms", "both ms", "rounds", "speed", "of the machine", "peak MiB"]
    table = Table(op, [*columns, "memory", "note"])
    for (model, dtype, contender), mine in grouped(rows, "model", "dtype", "contender").items():
        row, found = mine[0], {r["pass"]: r for r in mine}
        if row["status"] != "ok":
            table.add([model, row.get("sizes", ""), contender], note(row))
            continue
        cells = [model, f"{row['sizes']}, {dtype}", contender, *(milliseconds(found[p]) if p in found else "" for p in PASSES)]
        base = find(rows, model=model, dtype=dtype, contender="reference", **{"pass": "both"})
        if both := found.get("both"):
            speed = times(per_token(base) / per_token(both)) if base else ""
            memory = ratio(both["bytes"], base["bytes"]) if base else ""
            cells += [spread_of(both), speed, rate_of(both), mebibytes(both["bytes"]), memory]
        table.add(cells, note(row))
    return [table]


def step_tables(model: str, rows: list[dict]) -> list[Table]:
    base, ours = find(rows, contender="reference, eager"), find(rows, contender="ours")
    trainers = Table(f"Training step: {model}", ["trainer", "tokens/s", "rounds", "speed", "peak MiB", "memory", "first loss", "note"])
    off = Table(f"Ablation: {model}", ["switched off", "speed", "peak MiB", "memory", "note"])
    off.note = "Ours with this one op replaced by the reference, relative to ours; both take turns."
    for r in rows:
        is_ablation = r["contender"].startswith(WITHOUT)
        cells = [r["contender"].removeprefix(WITHOUT)]
        if r["status"] == "ok" and is_ablation:
            speed = times(r["ours_beside_it"]["median"] / r["seconds"]["median"]) if "ours_beside_it" in r else ""
            cells += [speed, mebibytes(r["bytes"]), ratio(r["bytes"], ours["bytes"]) if ours else ""]
        elif r["status"] == "ok":
            speed, memory = (times(per_token(base) / per_token(r)), ratio(r["bytes"], base["bytes"])) if base else ("", "")
            cells += [f"{tokens_per_second(r):,.0f}", spread_of(r), speed, mebibytes(r["bytes"]), memory, f"{r['loss']:.5f}"]
        (off if is_ablation else trainers).add(cells, note(r))
    if measured := find(rows):
        trainers.note = (
            f"{measured['tokens']:,} tokens per step, {measured['parameters'] / 1e6:.1f} M parameters, {measured['dtype']}; "
            "compiled unless eager; peak memory: of the process, minus what it held before it built the model; first loss: in fp32, "
            "with larger weights than those of a real run."
        )
    return [t for t in (trainers, off) if t.lines]


def scaling_tables(axis: str, rows: list[dict]) -> list[Table]:
    names = distinct(rows, "contender")
    table = Table(f"Scaling over the {axis}", [axis, *(f"{n} {what}" for what in ("tokens/s", "MiB") for n in names), "note"])
    table.note = "Training steps without torch.compile."
    for value in distinct(rows, "value"):
        found = [find(rows, value=value, contender=n) for n in names]
        speeds = [f"{tokens_per_second(r):,.0f}" if r else "" for r in found]
        memory = [mebibytes(r["bytes"]) if r else "" for r in found]
        notes = [f"{r['contender']}: {note(r)}" for r in rows if r["value"] == value and note(r)]
        table.add([f"{value:,}", *speeds, *memory], "; ".join(notes))
    return [table]


def generation_tables(model: str, rows: list[dict]) -> list[Table]:
    table = Table(f"Generation: {model}", ["implementation", "dtype", "tokens/s", "rounds", "ours is", "note"])
    table.note = "microstories-44m, random weights, greedy, 100 new tokens a prompt."
    if rows[0].get("device", "cpu") == "cpu":
        table.note += " On a CPU ours multiplies bf16 weights in fp32."
    for r in rows:
        cells = [r["contender"], r["dtype"]]
        if r["status"] == "ok":
            ours = find(rows, contender="ours", dtype=r["dtype"])
            faster = times(per_token(r) / per_token(ours)) if ours and ours is not r else ""
            cells += [f"{tokens_per_second(r):,.0f}", spread_of(r), faster]
        table.add(cells, note(r))
    return [table]


SUITES: dict[str, tuple[str, Callable[[str, list[dict]], list[Table]]]] = {  # what each table of the suite is about, its maker
    "ops": ("case", op_tables), "training step": ("model", step_tables), "scaling": ("case", scaling_tables),
    "generation": ("model", generation_tables),
}  # fmt: skip


def tables(rows: list[dict], *suites: str) -> list[Table]:
    """The tables of these suites; of all suites if none is given."""
    result = []
    for suite in suites or SUITES:
        key, make = SUITES[suite]
        result += [table for (name,), mine in grouped(of_suite(rows, suite), key).items() for table in make(name, mine)]
        if suite == "ops" and result:
            result[-1].note = OPS_NOTE
    return result


def slower_than_peers(rows: list[dict], margin: float = 0.03) -> list[str]:
    """The number of comparisons, then a line for each case in which another implementation is faster or smaller than ours by `margin`."""
    lines, n_compared = [], 0
    ok = [r for r in rows if r["status"] == "ok" and r.get("pass", "both") == "both"]
    keys = "suite", "case", "model", "value", "dtype"
    for (suite, op, model, value, dtype), found in grouped(ok, *keys).items():
        group = {r["contender"]: r for r in found}
        ours = group.get("ours")
        others = {n: r for n, r in group.items() if not n.startswith("ours")}
        if ours is None:
            continue
        n_compared += len(others)
        faster = {n: per_token(ours) / per_token(r) for n, r in others.items()}
        smaller = {n: r["bytes"] / ours["bytes"] for n, r in others.items() if ours["bytes"]}
        parts = [f"{n} is {x:.2f} × as fast" for n, x in faster.items() if x > 1 + margin]
        parts += [f"{n} needs {x:.2f} × the memory" for n, x in smaller.items() if x < 1 - margin]
        if parts:
            where = {"ops": f"{op}, {model}", "scaling": f"scaling, {op} {value}"}.get(suite, f"{suite}, {model}")
            lines.append(f"- {where}, {dtype}: {'; '.join(parts)}.")
    missing = len(grouped([r for r in rows if r["status"] != "ok"], *keys, "contender"))
    head = f"Ours was compared {n_compared} times with another; {missing} cases were not compared (the tables say why). "
    return [f"{head}Differences above {margin:.0%}:\n", *(lines or ["- nothing is faster or smaller than ours."])]


def about(machine: dict) -> str:
    return f"{machine['name']}, PyTorch {machine['torch']}, commit {machine['commit']}, {machine['date']}, `pytest bench --benchmark`"


def markdown(machine: dict, rows: list[dict], images: list[str]) -> str:
    head = f"{about(machine)}: {machine['seconds'] / 60:.0f} minutes, {machine['simd']}, 16-bit products: "
    head += f"{machine['half_precision'] or 'none, so fp32'}."
    if machine["device"] == "cpu":
        head += " On a CPU *ours* is what `tritale.kernels` runs there: PyTorch code, not the Triton kernels. There are fewer tokens."
    pictures = "\n".join(f"![{name}]({name})\n" for name in images)
    slower = "\n".join(slower_than_peers(rows))
    parts = [f"# Benchmarks: {machine['name']}\n\n{head}\n\n{pictures}", f"## Where another is faster or smaller than ours\n\n{slower}\n"]
    for suite in SUITES:
        parts += [f"## {suite.capitalize()}\n", *(t.markdown() for t in tables(rows, suite))]
    return "\n".join(parts)


def summary(machine: dict, rows: list[dict]) -> str:
    """For docs/bench.md: the training step, generation, and where another is faster or smaller than ours."""
    picture = f"![Tokens per second and memory of a training step](bench/{machine['slug']}-training-step.png)"
    shown = "\n".join(t.markdown() for t in tables(rows, "training step", "generation"))
    slower = "\n".join(slower_than_peers(rows))
    return "\n\n".join([f"{about(machine)}.", picture, shown, "### Where another is faster or smaller than ours", slower]) + "\n"


COLUMNS = ["tokens per second", "ours", "fastest other", "speed ratio", "memory ratio"]
CHINESE = {
    ", ": "，", "tokens per second": "每秒 token 数", "ours": "tritale", "fastest other": "其他库中最快的", "speed ratio": "速度比",
    "memory ratio": "内存比", "training step": "训练", "generation": "生成", "one prompt": "一个开头", "6 k vocabulary": "词表 6 k",
    "32 prompts of 1 to 40 characters": "32 个开头（1–40 字）",
}  # fmt: skip


def short_table(rows: list[dict], words: dict[str, str]) -> str:
    """For the README: ours and the fastest other library in the training step and in generation; `words` translates."""
    table = Table("", [words.get(column, column) for column in COLUMNS])
    ok = [r for r in rows if r["status"] == "ok" and r["suite"] in ("training step", "generation")]
    groups = grouped(ok, "suite", "model", "dtype")
    for suite, model, dtype in sorted(groups, key=lambda key: key[0] != "training step"):
        group = {r["contender"]: r for r in groups[suite, model, dtype]}
        others = [r for n, r in group.items() if not n.startswith(("ours", "reference"))]
        if "ours" not in group or not others:
            continue
        ours, best = group["ours"], min(others, key=per_token)
        parts = (suite, *model.split(", "), dtype)
        case = words.get(", ", ", ").join(words.get(part) or part for part in parts)
        speeds = f"{tokens_per_second(ours):,.0f}", f"{tokens_per_second(best):,.0f} ({best['contender']})"
        memory = ratio(ours["bytes"], best["bytes"]) if ours["bytes"] else ""
        table.lines.append([case, *speeds, times(per_token(best) / per_token(ours)), memory])
    return table.markdown()


# ---- charts -----------------------------------------------------------------------------------------------------------------------------


def new_figure(n_rows: int, n_columns: int, size: tuple[float, float], **options):
    """A matplotlib figure and its axes, a list of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titleweight": "bold",
        "axes.titlesize": 11, "figure.facecolor": "white", "savefig.dpi": 150, "axes.edgecolor": "#888888", "xtick.color": "#444444",
        "ytick.color": "#222222", "legend.frameon": False,
    })  # fmt: skip
    return plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained", **options)


def bars(axis, title: str, names: list[str], values: list[float], labels: list[str], colors: list[str], base: float | None = None) -> None:
    """Horizontal bars with their labels, and a dashed line at `base`."""
    top = max([*values, base or 0.0])
    axis.set_title(title)
    axis.barh(range(len(names)), values, color=colors, height=0.72)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    for y, (value, label) in enumerate(zip(values, labels, strict=True)):
        axis.text(value + 0.015 * top, y, label, va="center", fontsize=8.5, color="#222222", bbox=box)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, top * (1.55 if base else 1.32))
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    if base:
        axis.axvline(base, color="#555555", lw=0.8, ls=(0, (4, 3)), zorder=0)


def chart_ops(rows: list[dict], what: str):
    """A row of panels for each op and a panel for each model: speed or memory, relative to the reference."""
    ok = [r for r in of_suite(rows, "ops") if r["status"] == "ok" and r["pass"] == "both"]
    dtype = ok[0]["dtype"]
    ok = [r for r in ok if r["dtype"] == dtype]
    cases = distinct(ok, "case")
    models = sorted({r["model"] for r in ok}, key=["tiny", "44m", "124m", "1b"].index)
    groups = {key: [r for r in ok if (r["case"], r["model"]) == key] for key in ((c, m) for c in cases for m in models)}
    heights = [max(len(groups[c, m]) for m in models) for c in cases]
    size = (4.1 * len(models) + 1.6, 0.27 * sum(heights) + 0.62 * len(cases) + 0.9)
    figure, axes = new_figure(len(cases), len(models), size, height_ratios=heights)
    for line, case in zip(axes, cases, strict=True):
        for axis, model in zip(line, models, strict=True):
            group, is_first = groups[case, model], model == models[0]
            base = next((r for r in group if r["contender"] == "reference"), None)
            if base is None or not base["bytes"]:
                axis.set_axis_off()
                continue
            if what == "speed":
                values = [base["seconds"]["median"] / r["seconds"]["median"] for r in group]
                sizes = [f"{milliseconds(r)} ms" for r in group]
            else:
                values = [r["bytes"] / base["bytes"] for r in group]
                sizes = [f"{mebibytes(r['bytes'])} MiB" for r in group]
            labels = [f"{times(v)}   {size}" for v, size in zip(values, sizes, strict=True)]
            names = [r["contender"].replace("F.linear_cross_entropy, ", "F.linear_c._e., ") if is_first else "" for r in group]
            bars(axis, f"{case} · {model}" if is_first else model, names, values, labels, [COLORS[r["contender"]] for r in group], base=1)
    title = {
        "speed": "Speed relative to the reference (longer is faster)",
        "memory": "Peak memory relative to the reference (shorter is smaller)",
    }
    return figure, f"{title[what]}, forward and backward, {dtype}"


def chart_training_step(rows: list[dict]):
    ok = [r for r in of_suite(rows, "training step") if r["status"] == "ok" and not r["contender"].startswith(WITHOUT)]
    models = distinct(ok, "model")
    count = max(sum(r["model"] == m for r in ok) for m in models)
    figure, axes = new_figure(len(models), 2, (11, (0.36 * count + 0.75) * len(models) + 0.7))
    for (left, right), model in zip(axes, models, strict=True):
        group = [r for r in ok if r["model"] == model]
        base = next((r for r in group if r["contender"] == "reference, eager"), group[0])
        names = [r["contender"] if r["contender"].endswith("eager") else f"{r['contender']}, compiled" for r in group]
        colors = [COLORS[r["contender"]] if r["contender"] != "reference" else SKY for r in group]
        speeds, sizes = [tokens_per_second(r) for r in group], [r["bytes"] / 2**20 for r in group]
        labels = [f"{s:,.0f}   {times(s / tokens_per_second(base))}" for s in speeds]
        bars(left, f"{model}: tokens/s", names, speeds, labels, colors)
        labels = [f"{s:,.0f}   {times(s * 2**20 / base['bytes'])}" for s in sizes]
        bars(right, "peak MiB", [""] * len(group), sizes, labels, colors)
    return figure, f"A complete training step of {ok[0]['tokens']:,} tokens, {ok[0]['dtype']}"


def chart_scaling(rows: list[dict]):
    ok = [r for r in of_suite(rows, "scaling") if r["status"] == "ok"]
    cases = distinct(ok, "case")
    names = distinct(ok, "contender")
    figure, axes = new_figure(2, len(cases), (max(8.0, 3.9 * len(cases)), 6.4))
    for column, case in enumerate(cases):
        mine = [r for r in ok if r["case"] == case]
        values = distinct(mine, "value")
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
            axis.set_title(f"{what} over the {case}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    return figure, "Training steps, not compiled"


def charts(machine: dict, rows: list[dict], folder: Path) -> list[str]:
    """Draw the charts that the results have figures for, and return the names of the PNG files."""
    drawn = []
    for suite, name, draw in (
        ("training step", "training-step", chart_training_step),
        ("ops", "speed", lambda rows: chart_ops(rows, "speed")),
        ("ops", "memory", lambda rows: chart_ops(rows, "memory")),
        ("scaling", "scaling", chart_scaling),
    ):
        if any(r["status"] == "ok" and r.get("pass", "both") == "both" for r in of_suite(rows, suite)):
            drawn.append(f"{machine['slug']}-{name}.png")
            figure, title = draw(rows)
            where = f"{machine['name']}, PyTorch {machine['torch']}, commit {machine['commit']}"
            figure.suptitle(f"{title}\n{where}", x=0.01, ha="left", fontsize=12)
            figure.savefig(folder / drawn[-1])
            figure.clear()
    return drawn


def read_results(file: Path) -> tuple[dict, list[dict]]:
    """Read a results file. Raises FileNotFoundError, or ValueError if it was not written by `pytest bench --benchmark`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; measure with: pytest bench --benchmark")
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        return read["machine"], read["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a results file of pytest bench --benchmark ({error}); choose one in bench/results/") from error


def write_between_markers(page: Path, body: str, begins: str = BEGIN) -> None:
    before, begin, rest = page.read_text(encoding="utf-8").partition(begins)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{page} lacks the lines {begins!r} and {END!r}")
    page.write_text(f"{before}{begin}\n{body}{end}{after}", encoding="utf-8")
    print(f"written: {page}")


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__, formatter_class=style)
    parser.add_argument("results", type=Path, help="bench/results/MACHINE.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/bench")
    parser.add_argument("--pages", action="store_true", help="also write the summaries into docs/bench.md, README.md and README.zh.md")
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
        write_between_markers(ROOT / "docs/bench.md", summary(machine, rows))
        for name, words in (("README.md", {}), ("README.zh.md", CHINESE)):
            write_between_markers(ROOT / name, f"{about(machine)}\n\n{short_table(rows, words)}")


if __name__ == "__main__":
    main()
