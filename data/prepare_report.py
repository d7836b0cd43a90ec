"""What `prepare` tells at its end: on the terminal, and as one HTML file without scripts or links, its charts drawn in SVG."""

from collections.abc import Callable
from pathlib import Path

import jinja2
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .files import atomic_file
from .tokenizer import Tokenizer

VOCABULARIES = (2048, 4096, 8192, 16384, 32768, 65536)
PRESETS = ("quickstart", "microstories-44m")  # whose parameters the table compares


def vocabulary_table(train: list[str], validation: list[str], pool, told: Callable[[int, int], None]) -> list[dict]:
    """For each vocabulary size: characters per token on `validation` of a tokenizer trained on `train`, and the share of the parameters
    that the embedding has in each preset. Ends with the first size that the text does not support."""
    rows = []
    told(0, len(VOCABULARIES))
    ((_, bodies),) = pool.map(_bodies, [(None, ())])
    pool.stop()  # the process that imported torch
    for size, (found, stats) in pool.map(_measure, ((size, (train, validation, size)) for size in VOCABULARIES)):
        shares = {name: found * width / (found * width + body) for name, (body, width) in bodies.items()}
        rows.append({"vocab_size": found, **stats, "embedding_share": shares})
        told(len(rows), len(VOCABULARIES))
        if found < size:
            break
    told(len(VOCABULARIES), len(VOCABULARIES))
    return rows


def _measure(train: list[str], validation: list[str], vocab_size: int) -> tuple[int, dict]:
    tokenizer = Tokenizer.train(train, vocab_size)
    stats = tokenizer.stats(validation)
    return tokenizer.vocab_size, {"characters_per_token": stats.chars_per_token, "byte_fallback_share": stats.byte_fallback_share}


def _bodies() -> dict[str, tuple[int, int]]:
    # preset -> (matrix parameters without the embedding, width); in a worker, as it imports torch
    from ..model.gpt import GPTConfig

    configs = {name: GPTConfig.preset(name) for name in PRESETS}
    return {name: (c.n_matrix - c.vocab_size * c.width, c.width) for name, c in configs.items()}


def facts(report: dict) -> list[tuple[str, str]]:
    """(what, value) of everything in the report that fits on a line."""
    chosen, splits, options = report["selection"], report["splits"], report["options"]
    n_errors = sum(report["errors"].values())
    rows = [
        ("read", f"{report['documents_read']:,} documents from {report['files']:,} files, {report['bytes'] / 1e6:,.1f} MB"),
        ("left out, broken", f"{n_errors:,}" + "".join(f"; {n:,} × {what}" for what, n in report["errors"].items())),
        ("left out, blank", f"{chosen['blank']:,}"),
        ("changed by NFC, line ends", f"{report['normalised']:,} documents"),
        ("exact duplicates removed", f"{chosen['exact_duplicates']:,}" if options["dedup"] != "off" else "not looked for (--dedup off)"),
        (
            "near duplicates removed",
            f"{chosen['near_duplicates']:,}, of which {chosen['near_across_sides_removed']:,} were near a document of the other side"
            if options["dedup"] == "near"
            else "not looked for (--dedup near)",
        ),
        ("leak check, exact", f"{chosen['exact_leaks']:,} texts in both sides ({chosen['exact_across_sides_removed']:,} removed)"),
        (
            "leak check, near",
            "not made (--dedup near)" if chosen["near_leaks"] is None else f"{chosen['near_leaks']:,} pairs with one in each side",
        ),
        (
            "held out",
            f"--val-fraction {chosen['val_fraction']!r}, by hash of " + ("the group" if options["fields"]["group_key"] else "the text"),
        ),
        ("vocabulary", f"{report['vocab_size']:,} entries"),
    ]
    for side, split in splits.items():
        rows.append(
            (
                side,
                f"{split['documents']:,} documents, {split['characters']:,} characters, {split['tokens']:,} tokens; "
                f"{split['characters_per_token']:.3f} characters per token, {split['byte_fallback_share']:.2%} byte fallback",
            )
        )
    return rows


def is_leaking(report: dict) -> bool:
    return bool(report["selection"]["exact_leaks"] or report["selection"]["near_leaks"])


def print_report(report: dict, console: Console) -> None:
    for name, value in facts(report):
        console.print(Text(f"{name:26} {value}", style="red" if name.startswith("leak") and is_leaking(report) else ""))
    table = Table(
        "vocabulary", "characters per token", "byte fallback", *(f"embedding in {name}" for name in PRESETS), title="What to choose"
    )
    for row in report["vocabularies"]:
        shares = (f"{row['embedding_share'][name]:.0%}" for name in PRESETS)
        table.add_row(f"{row['vocab_size']:,}", f"{row['characters_per_token']:.3f}", f"{row['byte_fallback_share']:.2%}", *shares)
    console.print(table)
    table = Table("", "where", "characters", "byte fallback", "begins", title="The strangest documents")
    for kind, entries in report["strangest"].items():
        for e in entries:
            cells = kind, e["place"], f"{e['characters']:,}", f"{e['byte_fallback']:.1%}", e["excerpt"].replace("\n", " ")[:30]
            table.add_row(*map(Text, cells))
    console.print(table)


def write_html(path: Path, report: dict) -> None:
    """Write the page to `path`."""
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE)
    lengths = report["lengths"]
    html = page.render(
        facts=facts(report),
        is_leaking=is_leaking(report),
        report=report,
        presets=PRESETS,
        charts=[_bars(lengths["characters"], lengths["edges"], "characters"), _bars(lengths["tokens"], lengths["edges"], "tokens")],
        curve=_curve(report["vocabularies"]),
    )
    with atomic_file(path) as aside:
        aside.write_text(html, encoding="utf-8")


def _bars(counts: list[int], edges: list[float], unit: str) -> dict:
    # The bars that are not empty, with the ones between, on a field of 600 × 160.
    filled = [i for i, n in enumerate(counts) if n]
    first, last = filled[0], filled[-1]
    width, highest = 600 / (last - first + 1), max(counts)
    bars = []
    for i in range(first, last + 1):
        height = 160 * counts[i] / highest
        low, high = -(-edges[i] // 1), -(-edges[i + 1] // 1) - 1
        label = f"{low:,.0f}" if high <= low else f"{low:,.0f}–{high:,.0f}"
        at = (i - first) * width
        bars.append(
            {"x": at, "y": 160 - height, "width": width * 0.9, "height": height, "title": f"{label} {unit}: {counts[i]:,} documents"}
        )
    every = max(1, (last - first + 1) // 8)
    ticks = [{"x": (i - first) * width, "label": f"{edges[i]:,.0f}"} for i in range(first, last + 1, every)]
    return {"unit": unit, "bars": bars, "ticks": ticks, "highest": highest}


def _curve(rows: list[dict]) -> dict:
    # Characters per token and embedding shares over the vocabulary (each step of x one row), on a field of 600 × 200.
    step = 600 / max(len(rows) - 1, 1)
    top = max(row["characters_per_token"] for row in rows) * 1.1
    at = lambda values: [{"x": i * step, "y": 200 - 200 * v} for i, v in enumerate(values)]
    lines = [{"name": "characters per token", "points": at([row["characters_per_token"] / top for row in rows]), "class": "a"}]
    for name, css in zip(PRESETS, "bc", strict=True):
        lines.append({"name": f"embedding share, {name}", "points": at([row["embedding_share"][name] for row in rows]), "class": css})
    lowest = -20.0  # the names stand under each other, at least a line apart
    for line in sorted(lines, key=lambda line: line["points"][-1]["y"]):
        line["label_y"] = lowest = max(line["points"][-1]["y"] + 4, lowest + 14)
    return {"lines": lines, "top": top, "ticks": [{"x": i * step, "label": f"{row['vocab_size']:,}"} for i, row in enumerate(rows)]}


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>prepare: report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.warning { color: #b00020; font-weight: 600 }
.bad { color: #b00020 } svg { display: block; margin: .5rem 0 1.5rem; overflow: visible } svg text { font-size: 11px; fill: #555 }
.bar { fill: #4878a8 } .line { fill: none; stroke-width: 2 } .a { stroke: #222 } .b { stroke: #4878a8 } .c { stroke: #d07030 }
.axis { stroke: #bbb } .excerpt { word-break: break-all }
</style></head><body>
<h1>Prepared data</h1>
{% if is_leaking %}<p class="warning">Training and validation share documents; see the leak check.</p>{% endif %}
<table>{% for name, value in facts %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
{% if report.first_errors %}<h2>First errors</h2>
<ul>{% for error in report.first_errors %}<li class="excerpt">{{ error }}</li>{% endfor %}</ul>{% endif %}
<h2>Length of the documents</h2>
{% for chart in charts %}
<svg viewBox="-10 -20 640 215" width="640" height="215" role="img" aria-label="Histogram of the length in {{ chart.unit }}">
<text x="0" y="-6">documents by length in {{ chart.unit }}; highest bar {{ "{:,}".format(chart.highest) }}, four bars to a doubling</text>
{% for bar in chart.bars %}<rect class="bar" x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" height="{{ bar.height }}">
<title>{{ bar.title }}</title></rect>{% endfor %}
<line class="axis" x1="0" x2="600" y1="160.5" y2="160.5"/>
{% for tick in chart.ticks %}<text x="{{ tick.x }}" y="176">{{ tick.label }}</text>{% endfor %}
</svg>{% endfor %}
<h2>Vocabulary size</h2>
<p>A larger vocabulary makes fewer tokens of the same text, and takes a larger share of the parameters. Each row is a tokenizer trained
on a sample of the training documents and measured on a sample of the validation documents; embeddings are tied.</p>
<table><tr><th class="n">vocabulary</th><th class="n">characters per token</th><th class="n">byte fallback</th>
{% for name in presets %}<th class="n">embedding in {{ name }}</th>{% endfor %}</tr>
{% for row in report.vocabularies %}<tr><td class="n">{{ "{:,}".format(row.vocab_size) }}</td>
<td class="n">{{ "%.3f" | format(row.characters_per_token) }}</td>
<td class="n">{{ "%.2f" | format(100 * row.byte_fallback_share) }} %</td>
{% for name in presets %}<td class="n">{{ "%.0f" | format(100 * row.embedding_share[name]) }} %</td>{% endfor %}</tr>{% endfor %}</table>
<svg viewBox="-10 -20 840 250" width="840" height="250" role="img" aria-label="Characters per token and embedding share by vocabulary size">
<line class="axis" x1="0" x2="600" y1="200.5" y2="200.5"/>
{% for line in curve.lines %}<polyline class="line {{ line.class }}" points="{% for p in line.points %}{{ p.x }},{{ p.y }} {% endfor %}"/>
<text x="608" y="{{ line.label_y }}">{{ line.name }}</text>{% endfor %}
{% for tick in curve.ticks %}<text x="{{ tick.x }}" y="216" text-anchor="middle">{{ tick.label }}</text>{% endfor %}
<text x="0" y="-6">top: {{ "%.2f" | format(curve.top) }} characters per token, or 100 % of the parameters</text>
</svg>
<h2>The strangest documents</h2>
<table><tr><th></th><th>where</th><th>side</th><th class="n">characters</th><th class="n">tokens</th><th class="n">byte fallback</th>
<th>begins</th></tr>
{% for kind, entries in report.strangest.items() %}{% for e in entries %}<tr><td>{{ kind }}</td><td class="excerpt">{{ e.place }}</td>
<td>{{ e.side }}</td><td class="n">{{ "{:,}".format(e.characters) }}</td><td class="n">{{ "{:,}".format(e.tokens) }}</td>
<td class="n">{{ "%.1f" | format(100 * e.byte_fallback) }} %</td>
<td class="excerpt">{{ e.excerpt }}</td></tr>{% endfor %}{% endfor %}</table>
</body></html>
"""
