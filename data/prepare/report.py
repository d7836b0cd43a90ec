"""The report at the end of `prepare`: printed to the terminal, and as an HTML file with charts."""

import math
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ...common.charts import bar_chart, line_chart, render_page
from ...common.files import atomic_file
from ..tokenizer import Tokenizer, TokenizerStats

VOCABULARIES = (2048, 4096, 8192, 16384, 32768, 65536)


def vocabulary_table(
    train: list[str], validation: list[str], presets: Mapping[str, tuple[int, int]], pool, progress: Callable[[int, int], None]
) -> list[dict]:
    """Compare vocabulary sizes: characters per token on `validation` for a tokenizer trained on `train`, and the embedding's share of the
    parameters for each of `presets` (matrix parameters without the embedding, width). `progress` gets (sizes done, sizes).

    If the text gives fewer entries than a size, `found` is their number and the measurements are None."""
    progress(0, len(VOCABULARIES))
    pool.stop()  # frees the memory of the processes that computed the presets and so imported torch
    rows: list[dict] = []
    for size in VOCABULARIES:
        shares = {name: size * width / (size * width + body) for name, (body, width) in presets.items()}
        rows.append({"vocab_size": size, "characters_per_token": None, "byte_fallback_share": None, "embedding_share": shares})
    items = ((row, (train, validation, row["vocab_size"])) for row in rows)
    for n, (row, (found, stats)) in enumerate(pool.map(_measure, items, lambda row: f"a vocabulary of {row['vocab_size']:,}"), 1):
        progress(n, len(VOCABULARIES))
        for larger in rows[n - 1 :]:
            larger["found"] = found  # unless more are found for a larger one
        if found < row["vocab_size"]:
            break
        row |= {"characters_per_token": stats.chars_per_token, "byte_fallback_share": stats.byte_fallback_share}
    progress(len(VOCABULARIES), len(VOCABULARIES))
    return rows


def _measure(train: list[str], validation: list[str], vocab_size: int) -> tuple[int, TokenizerStats]:
    tokenizer = Tokenizer.train(train, vocab_size)
    return tokenizer.vocab_size, tokenizer.stats(validation)


def facts(report: dict) -> list[tuple[str, str]]:
    """(name, value) of everything in the report that fits on a line."""
    chosen, options = report["selection"], report["options"]
    errors = f"{sum(report['errors'].values()):,}" + "".join(f"; {n:,} × {what}" for what, n in report["errors"].items())
    exact = f"{chosen['exact_duplicates']:,}" if options["dedup"] != "off" else "not looked for (--dedup off)"
    near, near_leaks = "not looked for (--dedup near)", "not made (--dedup near)"
    if options["dedup"] == "near":
        near = f"{chosen['near_duplicates']:,}, of which {chosen['near_across_splits_removed']:,} were near a document of the other split"
        near_leaks = f"{chosen['near_leaks']:,} pairs across the splits"
    rows = [
        ("read", f"{report['documents_read']:,} documents from {report['files']:,} files, {report['bytes'] / 1e6:,.1f} MB"),
        ("left out, broken", errors),
        ("left out, blank", f"{chosen['blank']:,}"),
        ("changed by NFC, line ends", f"{report['normalised']:,} documents"),
        ("exact duplicates removed", exact),
        ("near duplicates removed", near),
        ("leak check, exact", f"{chosen['exact_leaks']:,} texts in both splits ({chosen['exact_across_splits_removed']:,} removed)"),
        ("leak check, near", near_leaks),
        ("held out", f"--val-fraction {chosen['val_fraction']!r}, by hash of the {held_out_by(options['fields'])}"),
        ("vocabulary", f"{report['vocab_size']:,} entries"),
    ]
    for name, split in report["splits"].items():
        of, per_token = " of answers", ""
        if "task" not in options["fields"]:
            of, per_token = "", f"{split['characters_per_token']:.3f} characters per token, "
        value = f"{split['documents']:,} documents, {split['characters']:,} characters{of}, {split['tokens']:,} tokens; "
        value += f"{per_token}{split['byte_fallback_share']:.2%} byte fallback"
        rows.append((name, value))
    return rows


def held_out_by(fields: dict) -> str:
    """What decides the split of a document."""
    return "group" if fields["group_key"] else {"sft": "answer", "dpo": "question"}.get(fields.get("task", ""), "text")


def is_leaking(report: dict) -> bool:
    return bool(report["selection"]["exact_leaks"] or report["selection"]["near_leaks"])


def visible(text: str) -> str:
    """`text` on one line, with control characters as escapes (\\x1b), so that none of them reaches the terminal."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) == "Cc" else c for c in text.replace("\n", " "))


def file_and_line(place: str) -> str:
    return visible(Path(place).name)


def vocabulary_cells(report: dict) -> list[list[str]]:
    """Heads and rows of the table of vocabulary sizes. A dash replaces a size that the text does not give."""
    rows = [["vocabulary", "characters\nper token", "byte\nfallback"]]
    rows[0] += (f"embedding in\n{name}" for name in report["vocabularies"][0]["embedding_share"])
    for row in report["vocabularies"]:
        is_measured = row["characters_per_token"] is not None
        measured = [f"{row['characters_per_token']:.3f}", f"{row['byte_fallback_share']:.2%}"] if is_measured else ["–", "–"]
        rows.append([f"{row['vocab_size']:,}", *measured, *(f"{share:.0%}" for share in row["embedding_share"].values())])
    return rows


def vocabulary_note(report: dict) -> str:
    last = report["vocabularies"][-1]
    return "" if last["characters_per_token"] is not None else f"–: the sample of the text gives {last['found']:,} entries and no more"


def print_report(report: dict, console: Console) -> None:
    for name, value in facts(report):
        console.print(Text(visible(f"{name:26} {value}"), style="red" if name.startswith("leak") and is_leaking(report) else ""))
    for error in report["first_errors"]:
        console.print(Text(visible(error), style="yellow"), soft_wrap=True)
    if report["vocabularies"]:  # conversations are encoded with their model's tokenizer
        heads, *rows = vocabulary_cells(report)
        table = Table(*heads, title="Vocabulary size", caption=vocabulary_note(report))
        for cells in rows:
            table.add_row(*cells)
        console.print(table)
    heads = ("", "file and line", "characters", "byte\nfallback", "text")
    table = Table(*(Column(head, overflow="fold") for head in heads), title="Unusual documents")
    for kind, entries in report["strangest"].items():
        for e in entries:
            place, text = file_and_line(e["place"]), visible(e["excerpt"][:30])
            table.add_row(*map(Text, (kind, place, f"{e['characters']:,}", f"{e['byte_fallback']:.1%}", text)))
    console.print(table)


def write_html(path: Path, report: dict) -> None:
    """Write the page to `path`."""
    heads, *rows = vocabulary_cells(report) if report["vocabularies"] else [[]]
    html = render_page(
        Path(__file__).with_name("report.html"),
        report=report,
        facts=facts(report),
        is_leaking=is_leaking(report),
        visible=visible,
        file_and_line=file_and_line,
        histograms=[_histogram(report["lengths"], unit) for unit in ("characters", "tokens")],
        curves=_curves(report["vocabularies"]) if rows else [],
        heads=heads,
        vocabularies=rows,
        note=vocabulary_note(report) if rows else "",
    )
    with atomic_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _histogram(lengths: dict, unit: str) -> str:
    # The bars from the first to the last that is not empty.
    filled, bars = [i for i, n in enumerate(lengths[unit]) if n], []
    for i in range(filled[0], filled[-1] + 1):
        low, high = math.ceil(lengths["edges"][i]), math.ceil(lengths["edges"][i + 1]) - 1
        interval = f"{low:,}" if high <= low else f"{low:,}–{high:,}"
        bars.append((f"{lengths['edges'][i]:,.0f}", f"{interval} {unit}: {lengths[unit][i]:,} documents", lengths[unit][i]))
    return bar_chart(f"Length in {unit}", "documents", unit, bars)


def _curves(rows: list[dict]) -> list[str]:
    sizes = [row["vocab_size"] for row in rows]
    measured = [row["characters_per_token"] for row in rows if row["characters_per_token"] is not None]
    shares = {name: [100 * row["embedding_share"][name] for row in rows] for name in rows[0]["embedding_share"]}
    charts = [("Characters per token", "on validation", {"measured": measured})] if measured else []
    charts.append(("Embedding", "% of all parameters", shares))
    return [line_chart(title, unit, "vocabulary", sizes, lines, log_x=True) for title, unit, lines in charts]
