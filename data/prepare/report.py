"""What `prepare` tells at its end: on the terminal, and as one HTML file without scripts or links, its charts drawn in SVG."""

import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

import jinja2
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ...common.files import atomic_file
from ..tokenizer import Tokenizer, TokenizerStats

VOCABULARIES = (2048, 4096, 8192, 16384, 32768, 65536)
PRESETS = ("quickstart", "microstories-44m")  # whose parameters the table compares
HEADS = ("vocabulary", "characters\nper token", "byte\nfallback", *(f"embedding in\n{name}" for name in PRESETS))


def vocabulary_table(
    train: list[str], validation: list[str], presets: Mapping[str, tuple[int, int]], pool, told: Callable[[int, int], None]
) -> list[dict]:
    """For each vocabulary size: the share of the parameters that the embedding has in each preset, and characters per token on
    `validation` of a tokenizer trained on `train`. Where this text does not give so many entries, `found` is smaller and these are None."""
    told(0, len(VOCABULARIES))
    pool.stop()  # the process that imported torch
    rows = []
    for size in VOCABULARIES:
        shares = {name: size * width / (size * width + body) for name, (body, width) in presets.items()}
        row = {"vocab_size": size, "found": None, "characters_per_token": None, "byte_fallback_share": None, "embedding_share": shares}
        rows.append(row)
    for n, (row, (found, stats)) in enumerate(pool.map(_measure, ((row, (train, validation, row["vocab_size"])) for row in rows)), 1):
        told(n, len(VOCABULARIES))
        if found < row["vocab_size"]:
            for larger in rows[n - 1 :]:
                larger["found"] = found
            break
        row |= {"found": found, "characters_per_token": stats.chars_per_token, "byte_fallback_share": stats.byte_fallback_share}
    told(len(VOCABULARIES), len(VOCABULARIES))
    return rows


def _measure(train: list[str], validation: list[str], vocab_size: int) -> tuple[int, TokenizerStats]:
    tokenizer = Tokenizer.train(train, vocab_size)
    return tokenizer.vocab_size, tokenizer.stats(validation)


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


def visible(text: str) -> str:
    """`text` on one line, with control characters as escapes (\\x1b), so that none of them reaches the terminal."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) == "Cc" else c for c in text.replace("\n", " "))


def file_and_line(place: str) -> str:
    return visible(Path(place).name)


def vocabulary_cells(report: dict) -> list[list[str]]:
    """The table of vocabulary sizes in words, – where the text does not give so many entries."""
    rows = []
    for row in report["vocabularies"]:
        is_measured = row["characters_per_token"] is not None
        measured = [f"{row['characters_per_token']:.3f}", f"{row['byte_fallback_share']:.2%}"] if is_measured else ["–", "–"]
        rows.append([f"{row['vocab_size']:,}", *measured, *(f"{row['embedding_share'].get(name, 0):.0%}" for name in PRESETS)])
    return rows


def vocabulary_note(report: dict) -> str:
    last = report["vocabularies"][-1]
    return "" if last["characters_per_token"] is not None else f"–: the sample of the text gives {last['found']:,} entries and no more"


def print_report(report: dict, console: Console) -> None:
    for name, value in facts(report):
        console.print(Text(visible(f"{name:26} {value}"), style="red" if name.startswith("leak") and is_leaking(report) else ""))
    table = Table(*HEADS, title="What to choose", caption=vocabulary_note(report))
    for cells in vocabulary_cells(report):
        table.add_row(*cells)
    console.print(table)
    heads = ("", "where", "characters", "byte\nfallback", "begins")
    table = Table(*(Column(head, overflow="fold") for head in heads), title="The strangest documents")
    for kind, entries in report["strangest"].items():
        for e in entries:
            where, begins = file_and_line(e["place"]), visible(e["excerpt"][:30])
            table.add_row(*map(Text, (kind, where, f"{e['characters']:,}", f"{e['byte_fallback']:.1%}", begins)))
    console.print(table)


def write_html(path: Path, report: dict) -> None:
    """Write the page to `path`."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"visible": visible, "file_and_line": file_and_line}
    page = environment.from_string(PAGE)
    lengths = report["lengths"]
    html = page.render(
        facts=facts(report),
        is_leaking=is_leaking(report),
        report=report,
        heads=HEADS,
        vocabularies=vocabulary_cells(report),
        note=vocabulary_note(report),
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
    # Characters per token, where measured, and embedding shares over the vocabulary (each step of x one row), on a field of 600 × 200.
    step = 600 / max(len(rows) - 1, 1)
    measured = [row["characters_per_token"] for row in rows if row["characters_per_token"] is not None]
    top = max(measured, default=1.0) * 1.1
    at = lambda values: [{"x": i * step, "y": 200 - 200 * v} for i, v in enumerate(values)]
    lines = [{"name": "characters per token", "points": at([value / top for value in measured]), "class": "a"}] if measured else []
    for name, css in zip(PRESETS, "bc", strict=True):
        lines.append(
            {"name": f"embedding share, {name}", "points": at([row["embedding_share"].get(name, 0) for row in rows]), "class": css}
        )
    lowest = -20.0  # the names stand under each other, at least a line apart
    for line in sorted(lines, key=lambda line: line["points"][-1]["y"]):
        line["label_x"] = line["points"][-1]["x"] + 8
        line["label_y"] = lowest = max(line["points"][-1]["y"] + 4, lowest + 14)
    return {"lines": lines, "top": top, "ticks": [{"x": i * step, "label": f"{row['vocab_size']:,}"} for i, row in enumerate(rows)]}


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>prepare: report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; display: block; overflow-x: auto }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.warning { color: #b00020; font-weight: 600 }
svg { display: block; margin: .5rem 0 1.5rem; max-width: 100%; height: auto } svg text { font-size: 11px; fill: #555 }
.bar { fill: #4878a8 } .line { fill: none; stroke-width: 2 } .a { stroke: #222 } .b { stroke: #4878a8 } .c { stroke: #d07030 }
.axis { stroke: #bbb } .excerpt { overflow-wrap: anywhere } .place { white-space: nowrap } th { white-space: pre-line }
</style></head><body>
<h1>Prepared data</h1>
{% if is_leaking %}<p class="warning">Training and validation share documents; see the leak check.</p>{% endif %}
<table>{% for name, value in facts %}<tr><th>{{ name }}</th><td class="excerpt">{{ value | visible }}</td></tr>{% endfor %}</table>
{% if report.first_errors %}<h2>First errors</h2>
<ul>{% for error in report.first_errors %}<li class="excerpt">{{ error | visible }}</li>{% endfor %}</ul>{% endif %}
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
<table><tr>{% for head in heads %}<th class="n">{{ head }}</th>{% endfor %}</tr>
{% for row in vocabularies %}<tr>{% for cell in row %}<td class="n">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% if note %}<p>{{ note }}</p>{% endif %}
<svg viewBox="-10 -20 840 250" width="840" height="250" role="img" aria-label="Characters per token and embedding share by vocabulary size">
<line class="axis" x1="0" x2="600" y1="200.5" y2="200.5"/>
{% for line in curve.lines %}<polyline class="line {{ line.class }}" points="{% for p in line.points %}{{ p.x }},{{ p.y }} {% endfor %}"/>
<text x="{{ line.label_x }}" y="{{ line.label_y }}">{{ line.name }}</text>{% endfor %}
{% for tick in curve.ticks %}<text x="{{ tick.x }}" y="216" text-anchor="middle">{{ tick.label }}</text>{% endfor %}
<text x="0" y="-6">top: {{ "%.2f" | format(curve.top) }} characters per token, or 100 % of the parameters</text>
</svg>
<h2>The strangest documents</h2>
<table><tr><th></th><th>where</th><th>side</th><th class="n">characters</th><th class="n">tokens</th><th class="n">byte fallback</th>
<th>begins</th></tr>
{% for kind, entries in report.strangest.items() %}{% for e in entries %}<tr><td>{{ kind }}</td>
<td class="place" title="{{ e.place | visible }}">{{ e.place | file_and_line }}</td>
<td>{{ e.side }}</td><td class="n">{{ "{:,}".format(e.characters) }}</td><td class="n">{{ "{:,}".format(e.tokens) }}</td>
<td class="n">{{ "%.1f" | format(100 * e.byte_fallback) }} %</td>
<td class="excerpt">{{ e.excerpt | visible }}</td></tr>{% endfor %}{% endfor %}</table>
</body></html>
"""
