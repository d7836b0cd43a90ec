"""The results of an evaluation as files: evaluate.json, and evaluate.html, a page that makes no network request."""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ..common.charts import render_page
from ..data.shards import evenly
from .sweep_page import csp_hash, write_json_and_page

SHOWN = 60  # instructions whose stories are on the page
KINDS = {
    "words": "words 词汇", "feature": "feature 特点", "people": "people 人物", "place": "place 地点", "summary": "summary 摘要",
    "sentence": "sentence 随机句子", "length": "length 长度", "beginning": "beginning 开头",
}  # fmt: skip
FEATURES = {
    "对话": "dialogue 对话", "转折": "turn 转折", "冲突": "conflict 冲突", "伏笔": "foreshadowing 伏笔", "寓意": "moral 寓意",
    "坏结局": "bad ending 坏结局",
}  # fmt: skip
MEASURES = {  # key → name, format
    "coherent": ("coherent", "{:.0%}"),
    "consistent": ("consistent cast", "{:.0%}"),
    "ends_properly": ("ends properly", "{:.0%}"),
    "repeated_4grams": ("repeated 4-grams", "{:.1%}"),
    "length": ("characters", "{:.0f}"),
    "distinct_3": ("distinct-3", "{:.2f}"),
    "overlap": ("copied characters", "{:.0f}"),
    "bits_per_char": ("bits/char, plain text", "{:.3f}"),
}


class Cell(NamedTuple):
    """One figure: its text, and as percentages the rate with the ends of its interval, if it has them."""

    text: str
    range: tuple[float, float, float] | None = None  # low, rate, high


def figures(report: dict) -> list[tuple[str, list[tuple[str, str, list[Cell]]]]]:
    """The table: (title, rows) of each group. A row is (name, number of cases, a cell for each model, chance and held-out stories)."""
    columns = [*report["models"], report["by_chance"], report["reference"]]
    groups = []
    by_number = {n: f"{n} requirement{'s' if n != '1' else ''}" for n in report["reference"]["together"]}
    for title, key, names in (("met", "kinds", KINDS), ("features met", "features", FEATURES), ("all met of", "together", by_number)):
        rows = []
        for k, name in names.items():
            if own := report["reference"][key].get(k):
                cells = [rate_cell(column[key][k]) for column in columns[:-1]]
                rows.append((name, f"{own['of']:,}", [*cells, Cell(f"{own['rate']:.0%}")]))
        if rows:
            groups.append((title, rows))
    measures = []
    for key, (name, form) in MEASURES.items():
        values = [column.get(key) for column in columns]
        if any(value is not None for value in values):
            measures.append((name, "", [Cell("–" if value is None else form.format(value)) for value in values]))
    return [*groups, ("stories", measures)]


def rate_cell(rate: dict) -> Cell:
    low, middle, high = (100 * rate[key] for key in ("low", "rate", "high"))
    return Cell(f"{middle:.0f}% ({low:.0f}–{high:.0f})", (low, middle, high))


def marked(text: str, requirements: list[dict]) -> list[tuple[str, bool]]:
    """The text in pieces: (piece, whether it is a word or sentence that was asked for)."""
    wanted = [w for r in requirements if r["kind"] != "length" for w in (r.get("words") or [r["text"]])]
    is_marked = [False] * len(text)
    for word in wanted:
        at = text.find(word)
        while at >= 0:
            is_marked[at : at + len(word)] = [True] * len(word)
            at = text.find(word, at + 1)
    cuts = [0, *(i for i in range(1, len(text)) if is_marked[i] != is_marked[i - 1]), len(text)]
    return [(text[a:b], is_marked[a]) for a, b in pairwise(cuts) if a < b]


def missed(sample: dict, story: dict) -> str:
    """The kinds of the requirements that the story does not meet, separated by spaces."""
    return " ".join(r["kind"] for r, v in zip(sample["requirements"], story["verdicts"], strict=True) if v["is_met"] is False)


def page(report: dict, stages: list[tuple[str, str, float]] | None = None) -> str:
    """The report as HTML, with all text of models and users escaped. `stages`: the (folder, command, seconds) that made the models."""
    return render_page(
        Path(__file__).with_name("instructions_page.html"),
        report=report,
        stages=stages,
        figures=figures(report),
        shown=evenly(len(report["samples"]), SHOWN),
        kinds=KINDS,
        marked=marked,
        missed=missed,
        csp_hash=csp_hash,
    )


def write_evaluation(report: dict, json_path: Path, html_path: Path) -> None:
    write_json_and_page(report, page, json_path, html_path, indent=1)
