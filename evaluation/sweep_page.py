"""sweep.html: a sweep's report as one page that asks the network for nothing. sweep.json is written with it."""

import base64
import hashlib
import json
import math
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ..common.files import atomic_file
from .sweep import REPEATS

TEMPLATE = Path(__file__).with_name("sweep_page.html")
WIDTH, HEIGHT = 340, 200  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 12, 34  # margins of the plotted area
LABELS, LINE = 70, 12  # the margin right of a chart with dashed lines, for their labels; the height of a label
SHOWN_LOOP = 8  # shorter loops (哈哈, 蹦蹦跳跳) are part of good stories

CHARTS = (  # title, unit, {key: label}, percent
    ("Validation", "bits per character", {"val_bits_per_char": "validation"}, False),
    ("Repeated 4-grams", "% of all, per story", {"repeated_4grams": "model"}, True),
    ("Longest loop", "characters, per story", {"longest_loop": "model"}, False),
    ("Stories that …", "% of all", {"ends_properly": "end properly", "consistent": "keep people", "coherent": "coherent"}, True),
    ("Distinct n-grams", "% of all n-grams", {"distinct_1": "n = 1", "distinct_2": "n = 2", "distinct_3": "n = 3"}, True),
    ("Length", "characters, per story", {"length": "model"}, False),
    ("Copied", "longest stretch, characters", {"overlap": "model"}, False),
)


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `wanted` steps apart."""
    if high <= low:
        high = low + 1
    raw = (high - low) / wanted
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def spread(ys: list[float]) -> list[float]:
    """Where labels wanted at `ys`, from the top down, stand: each near its own, `LINE` apart, none below the plotted area."""
    ys = list(ys)
    for i in range(1, len(ys)):
        ys[i] = max(ys[i], ys[i - 1] + LINE)
    for i in reversed(range(len(ys))):
        ys[i] = min(ys[i], ys[i + 1] - LINE if i + 1 < len(ys) else HEIGHT - BOTTOM)
    return ys


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def chart(rows: list[dict], reference: dict, floor: float | None, title: str, unit: str, labels: dict[str, str], percent: bool) -> dict:
    """What the template draws: points and ticks in the chart's own units."""
    scale = 100 if percent else 1
    keys = [key for key in labels if rows[0][key] is not None]
    lines = {key: [scale * row[key] for row in rows] for key in keys}
    real = {key: scale * reference[key] for key in keys if key in reference}
    dashed = {"chance": floor} if keys == ["val_bits_per_char"] and floor else {}
    if len(keys) == 1 and real:
        dashed = {"real": real[keys[0]]}
    if keys == ["repeated_4grams"]:
        dashed["threshold"] = scale * REPEATS
    dashed = dict(sorted(dashed.items(), key=lambda item: -item[1]))
    right = WIDTH - (LABELS if dashed else RIGHT)
    values = [v for line in lines.values() for v in line] + list(dashed.values())
    y_ticks = ticks(0, max(values)) if not percent or max(values) < 95 else [0, 25, 50, 75, 100]
    steps = [row["step"] for row in rows]
    x_ticks = [t for t in ticks(0, steps[-1]) if t <= steps[-1] * 1.001 and t == int(t)]

    def x(step: float) -> float:
        return round(LEFT + (right - LEFT) * step / steps[-1], 1) if steps[-1] else LEFT

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / y_ticks[-1], 1)

    label_ys = spread([y(value) for value in dashed.values()])
    return {
        "title": title,
        "unit": unit,
        "x_ticks": [(x(t), f"{t:,.0f}") for t in x_ticks],
        "y_ticks": [(y(t), number(t)) for t in y_ticks],
        "xs": [x(step) for step in steps],
        "right": right,
        "dashed": [(y(v), at, label, number(v)) for at, (label, v) in zip(label_ys, dashed.items(), strict=True)],
        "lines": [
            {
                "label": labels[key],
                "points": [(x(s), y(v), f"step {s:,}: {labels[key]} {number(v)}") for s, v in zip(steps, line, strict=True)],
            }
            for key, line in lines.items()
        ],
    }


def pieces(story: dict) -> list[tuple[str, str]]:
    """The story's text cut where a mark begins or ends: (text, names of the marks on it)."""
    marks = {"copy": story["overlap"]}
    if story["loop"] and story["loop"][1] - story["loop"][0] >= SHOWN_LOOP:
        marks["loop"] = story["loop"][:2]
    text = story["text"]
    cuts = sorted({0, len(text), *(edge for mark in marks.values() for edge in mark)})
    return [(text[a:b], " ".join(name for name, (start, end) in marks.items() if start <= a and b <= end)) for a, b in pairwise(cuts)]


def csp_hash(script: str) -> str:
    """The script's hash, with which a page says that it and no other may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def page(report: dict) -> str:
    """The report as HTML. Everything that a model or a user wrote is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"csp_hash": csp_hash, "pieces": pieces}
    rows, reference, floor = report["checkpoints"], report["reference"], report["validation"]["entropy_bits_per_char"]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        rows=rows,
        reference=reference,
        repeats=REPEATS,
        shown_loop=SHOWN_LOOP,
        charts=[chart(rows, reference, floor, *parts) for parts in CHARTS],
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "top": TOP, "bottom": HEIGHT - BOTTOM},
    )


def write_sweep(report: dict, json_path: Path, html_path: Path) -> None:
    """Write both files; both texts are made first, so a report that cannot be JSON (ValueError) or a page leaves the old ones."""
    as_json = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for path, text in ((html_path, page(report)), (json_path, as_json)):
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
