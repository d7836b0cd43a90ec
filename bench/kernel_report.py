"""The kernels' report card, on any machine: machine code for every GPU generation, and bytes moved against the ideal.

    python -m bench.kernel_report [--out out/kernel_report] [--targets sm_86,sm_90] [--ops rms_norm,rope] [--no-traffic]

Compiles what the ops' own launchers launch (no GPU is needed; minutes the first time, seconds from Triton's cache), counts traffic in the
interpreter, prints two tables and writes them as PREFIX.json and PREFIX.md.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.kernels.harness.compile_matrix import MODELS, TARGETS, readings
from tests.kernels.harness.traffic_matrix import traffic_rows

CODE = ("target", "op", "model", "kernel", "warps", "registers", "spilled", "shared", "occupancy")
CODE += ("loads 128/less", "stores 128/less", "tensor core")
TRAFFIC = ("op", "pass", "loaded", "stored", "cached", "ideal", "ratio", "note")


def code_line(row: dict) -> list[str]:
    head = [row["target"], row["op"], row["model"], row["kernel"]]
    if "error" in row:
        return [*head[:3], row["error"], *[""] * (len(CODE) - 4)]
    return [
        *head,
        str(row["warps"]),
        str(row["registers"]),
        str(row["stack"] + row["local"]),
        f"{row['shared'] / 1024:.1f} KB",
        "" if row["occupancy"] is None else f"{row['occupancy']:.0%}",
        f"{row['load_128']}/{row['load_narrower']}",
        f"{row['store_128']}/{row['store_narrower']}",
        " ".join(row["tensor_core"]),
    ]


def traffic_line(row: dict) -> list[str]:
    return [f"{row[c]:,}" if isinstance(row[c], int) else str(row[c]) for c in TRAFFIC]


def markdown(title: str, columns: tuple[str, ...], lines: list[list[str]]) -> str:
    table = [columns, ["---"] * len(columns), *lines]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/kernel_report"))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ops", default="", help="all by default")
    parser.add_argument("--no-traffic", action="store_true")
    a = parser.parse_args()
    code = readings(a.targets.split(","), tuple(filter(None, a.ops.split(","))), a.models.split(","))
    traffic = [] if a.no_traffic else traffic_rows()
    parts = [("Machine code", CODE, [code_line(r) for r in code]), ("Traffic", TRAFFIC, [traffic_line(r) for r in traffic])]
    parts = [part for part in parts if part[2]]
    console = Console()
    for title, columns, lines in parts:
        table = Table(*columns, title=title)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.with_suffix(".json").write_text(json.dumps({"machine_code": code, "traffic": traffic}, indent=1))
    a.out.with_suffix(".md").write_text("\n".join(markdown(*part) for part in parts))
    console.print(f"written: {a.out.with_suffix('.json')}, {a.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
