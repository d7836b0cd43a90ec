"""Report on the kernels, on any machine: machine code for every GPU architecture, and bytes moved over the ideal.

    python -m bench.kernel_report [--targets sm_86,sm_90] [--ops rms_norm,rope] [--no-traffic] [--json FILE] [--markdown FILE]

It compiles every kernel with the options that the ops launch it with, and counts memory traffic in the interpreter. No GPU is needed. The
first run takes minutes, later ones seconds, because Triton caches the compiled code.

A complete report is printed and written to bench/results/kernels.json and docs/kernels-report.md, and its first table to docs/kernels.md. A
partial one is written to out/.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import machine_code, traffic
from bench.machine_code import GATED, HEADS, MODELS, TARGETS

ROOT = Path(__file__).parents[1]
PAGE, BEGIN, END = ROOT / "docs/kernels.md", "<!-- table: python -m bench.kernel_report -->", "<!-- end of table -->"
CARDS = {
    "sm_75": "Turing: T4, RTX 20; in fp16", "sm_80": "Ampere: A100", "sm_86": "Ampere: RTX 30, A10, A40", "sm_89": "Ada: RTX 40, L4, L40",
    "sm_90": "Hopper: H100, H200", "sm_100": "Blackwell: B200", "sm_120": "Blackwell: RTX 50", "gfx942": "CDNA 3: MI300",
}  # fmt: skip
KEY = """\
- **registers** of a thread (255 at most; CDNA 3: 512), **shared** memory of a block, **occupancy**: the fraction of an SM's warps that
  registers, shared memory and tensor memory leave room for.
- **spilled**: bytes of stack, plus instructions on local memory. A test requires 0 everywhere.
- **load**, **store**: bits of the widest access to global memory. Kernels that stream their tensors do so in 128 bits, and a test counts
  the narrower ones. What remains are a few numbers of each row, and the sums of a matrix product in the layout of its units.
- **tensor core**: the instruction that multiplies blocks: HMMA on Ampere, Ada and RTX 50, HGMMA on Hopper, UTCHMMA on B200, MFMA on CDNA.
- **tensor work**: tensor FLOPs executed over needed. Above 1 warps compute the same products several times.
- **traffic**: bytes loaded and stored over the ideal, each input read once and each output written once; or over kernels.md's formula."""
CODE = (
    "op",
    "pass",
    "kernel",
    "model",
    "warps",
    "registers",
    "shared",
    "occupancy",
    "spilled",
    "load",
    "store",
    "tensor core",
    "tensor work",
)
Part = tuple[str, str, tuple[str, ...], list[list[str]]]  # title, text, columns, lines
GLANCE = ("op", "pass", "kernel", "registers", "shared", "occupancy", "spilled", "load", "store", "tensor core", "tensor work", "traffic")
TRAFFIC = ("op", "pass", "loaded", "stored", "from cache", "ideal", "over ideal", "formula", "over formula", "note")


def span(values: list, form) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low}–{high}"


def kilobytes(n: int) -> str:
    return "0" if n == 0 else f"{n} B" if n < 1024 else f"{n / 1024:.0f} KB"


def numbers(rows: list[dict]) -> list[str]:
    """Registers to tensor work of rows, as spans."""
    return [
        span([r["registers"] for r in rows], str),
        span([r["shared"] for r in rows], kilobytes),
        span([r["occupancy"] for r in rows], "{:.0%}".format),
        str(sum(r["stack"] + r["local"] for r in rows)),
        span([r["load_bits"] for r in rows], str),
        span([r["store_bits"] for r in rows], str),
        " ".join(sorted({t.removeprefix("v_").upper() for r in rows for t in r["tensor_core"]})),
        span([r["tensor_ratio"] for r in rows], "{:.2f}".format) if rows[0]["has_dot"] else "",
    ]


def code_lines(rows: list[dict]) -> list[list[str]]:
    """A line for each binary of one target, with the models that share it."""
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault((r["op"], r["pass"], r["kernel"], r["binary"]), []).append(r)
    return [
        [op, which, kernel, ", ".join(dict.fromkeys(r["model"] for r in group)), str(group[0]["warps"]), *numbers(group[:1])]
        for (op, which, kernel, _), group in groups.items()
    ]


def traffic_of(op: str, which: str, traffic: list[dict]) -> str:
    name = (
        "linear_cross_entropy chunk"
        if op == "linear_cross_entropy"
        else op.removesuffix(", capped").removesuffix(" packed").removesuffix(" fp32")
    )
    found = [r for r in traffic if r["op"] == name and r["pass"] in (which, "both")]
    if not found:
        return ""
    row, both = found[0], " (both)" if found[0]["pass"] == "both" else ""
    return f"{row['ratio']:.2f}{both}" if row["formula_ratio"] is None else f"{row['formula_ratio']:.2f} × formula{both}"


def glance_lines(rows: list[dict], traffic: list[dict]) -> list[list[str]]:
    """The cells of a table with one line per kernel: each cell summarises all models and targets."""
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault((r["op"], r["pass"], r["kernel"]), []).append(r)
    return [[op, which, kernel, *numbers(group), traffic_of(op, which, traffic)] for (op, which, kernel), group in groups.items()]


def traffic_line(row: dict) -> list[str]:
    cells = [row[c] for c in ("op", "pass", "loaded", "stored", "cached", "ideal", "ratio", "formula", "formula_ratio", "note")]
    return ["" if c is None else f"{c:,}" if isinstance(c, int) else f"{c:.3f}" if isinstance(c, float) else c for c in cells]


def markdown_table(columns: tuple[str, ...], lines: list[list[str]]) -> str:
    right = {"registers", "shared", "occupancy", "spilled", "load", "store", "warps", "tensor work", *TRAFFIC[2:9]}
    rules = ["---:" if c in right else "---" for c in columns]
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, rules, *lines))


def as_json(code: list[dict], traffic: list[dict]) -> str:
    lists = {"machine_code": code, "traffic": traffic}
    body = ",\n".join(f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in lists.items())
    return f'{{"triton": "{version("triton")}",\n{body}}}\n'


def as_markdown(parts: list[Part], models: list[str]) -> str:
    sizes = ("batch", "context", "width", "n_head", "n_kv_head", "head_dim", "mlp", "vocab")
    shapes = [[m, *(f"{size:,}" for size in map({**MODELS, **HEADS}[m].get, sizes))] for m in models]
    head = ("model", "batch", "context", "width", "heads", "k/v heads", "head size", "MLP", "vocabulary")
    text = f"# Kernel report\n\nWritten by `python -m bench.kernel_report` with triton {version('triton')}, on a machine without a GPU. "
    text += "What the ops launch at these shapes, forward and backward, compiled for every architecture; [kernels.md](kernels.md) explains."
    text += f"\n\n{markdown_table(head, shapes)}\n{KEY}\n\n"
    return text + "\n".join(f"## {title}\n\n{about}\n\n{markdown_table(columns, lines)}" for title, about, columns, lines in parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Report on the kernels: machine code for every GPU architecture, and bytes moved over the ideal."
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--models", default=",".join(GATED))
    parser.add_argument("--ops", default="", help="all by default")
    parser.add_argument("--no-traffic", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    a = parser.parse_args()
    targets, ops, models = a.targets.split(","), tuple(filter(None, a.ops.split(","))), a.models.split(",")
    is_complete = tuple(targets) == TARGETS and not ops and models == list(GATED) and not a.no_traffic
    json_file = a.json or (ROOT / "bench/results/kernels.json" if is_complete else Path("out/kernels.json"))
    markdown_file = a.markdown or (ROOT / "docs/kernels-report.md" if is_complete else Path("out/kernels-report.md"))
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)

    with Progress(console=console) as progress:
        bar = progress.add_task("compiling", total=None)
        report = lambda i, n, name: progress.update(bar, completed=i, total=n, description=f"compiled {name}")
        code = machine_code.readings(targets, ops, models, a.processes, report)
        moved = []
        if not a.no_traffic:
            bar = progress.add_task("counting traffic in the interpreter", total=None)
            moved = traffic.readings()
            progress.update(bar, total=1, completed=1)

    failed = [r for r in code if "error" in r]
    rows = [r for r in code if "error" not in r]
    parts: list[Part] = [("At a glance", "Every kernel, over all models and architectures.", GLANCE, glance_lines(rows, moved))]
    if moved:
        text = "Bytes, at small shapes. *From cache*: a norm's weight, cos and sin, targets. *Formula*: see [kernels.md](kernels.md)."
        parts.append(("Traffic", text, TRAFFIC, [traffic_line(r) for r in moved]))
    for target in targets:
        parts.append((target, CARDS[target], CODE, code_lines([r for r in rows if r["target"] == target])))
    for title, text, columns, lines in parts:
        table = Table(*columns, title=f"{title} · {text}" if title in TARGETS else title)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for r in failed:
        console.print(f"[red]{r['target']} {r['op']} {r['model']}: {r['error']}")

    for file, text in ((json_file, as_json(code, moved)), (markdown_file, as_markdown(parts, models))):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        console.print(f"written: {file}")
    if is_complete:
        _, _, columns, lines = parts[0]
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{markdown_table(columns, lines)}{END}{rest.partition(END)[2]}", encoding="utf-8")
        console.print(f"written: the table in {PAGE}")


if __name__ == "__main__":
    main()
