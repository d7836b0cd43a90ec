"""The results of a sweep as files: sweep.json, and sweep.html, a page that makes no network request."""

import base64
import hashlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from markupsafe import Markup

from ..common.charts import line_chart, render_page
from ..common.files import atomic_file
from .sweep import REPEATS

SHOWN_LOOP = 8  # characters; shorter loops (哈哈, 蹦蹦跳跳) are normal in good stories

CHARTS = (  # title, unit, {key: label}
    ("Validation", "bits per character", {"val_bits_per_char": "validation"}),
    ("Repeated 4-grams", "% of all, per story", {"repeated_4grams": "model"}),
    ("Longest loop", "characters, per story", {"longest_loop": "model"}),
    ("Good stories", "% of all", {"ends_properly": "ends properly", "consistent": "consistent cast", "coherent": "coherent"}),
    ("Distinct n-grams", "% of all n-grams", {"distinct_1": "n = 1", "distinct_2": "n = 2", "distinct_3": "n = 3"}),
    ("Length", "characters, per story", {"length": "model"}),
    ("Copied", "longest stretch, characters", {"overlap": "model"}),
)


def chart(rows: list[dict], reference: dict, entropy: float | None, title: str, unit: str, labels: dict[str, str]) -> Markup:
    """The chart of one entry of CHARTS. A single line is compared with the same measure of held-out stories."""
    scale = 100 if unit.startswith("%") else 1
    keys = [key for key in labels if rows[0][key] is not None]
    references = {}
    if keys == ["val_bits_per_char"] and entropy:
        references = {"entropy": entropy}
    elif len(keys) == 1 and keys[0] in reference:
        references = {"held-out": scale * reference[keys[0]]}
    if keys == ["repeated_4grams"]:
        references["threshold"] = scale * REPEATS
    lines = {labels[key]: [scale * row[key] for row in rows] for key in keys}
    return line_chart(title, unit, "step", [row["step"] for row in rows], lines, references=references, cursors=("a", "b"))


def pieces(story: dict) -> list[tuple[str, str]]:
    """The story's text, cut at the edges of its marks: (text, names of the marks on it)."""
    marks = {"copy": story["overlap"]}
    if story["loop"] and story["loop"][1] - story["loop"][0] >= SHOWN_LOOP:
        marks["loop"] = story["loop"][:2]
    text = story["text"]
    cuts = sorted({0, len(text), *(edge for mark in marks.values() for edge in mark)})
    return [(text[a:b], " ".join(name for name, (start, end) in marks.items() if start <= a and b <= end)) for a, b in pairwise(cuts)]


def csp_hash(script: str) -> str:
    """The source expression with which a Content-Security-Policy allows this script alone."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def page(report: dict) -> str:
    """The report as HTML, with all text of models and users escaped."""
    rows, reference, entropy = report["checkpoints"], report["reference"], report["validation"]["entropy_bits_per_char"]
    return render_page(
        Path(__file__).with_name("sweep_page.html"),
        report=report,
        rows=rows,
        reference=reference,
        repeats=REPEATS,
        shown_loop=SHOWN_LOOP,
        charts=[chart(rows, reference, entropy, *parts) for parts in CHARTS],
        csp_hash=csp_hash,
        pieces=pieces,
    )


def write_json_and_page(report: dict, page: Callable[[dict], str], json_path: Path, html_path: Path, *, indent: int) -> None:
    """Write both files. A report that cannot be written as JSON (ValueError) or as a page leaves earlier files unchanged."""
    as_json = json.dumps(report, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    for path, text in ((html_path, page(report)), (json_path, as_json)):
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_sweep(report: dict, json_path: Path, html_path: Path) -> None:
    write_json_and_page(report, page, json_path, html_path, indent=2)
