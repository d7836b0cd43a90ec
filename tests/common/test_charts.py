"""The charts of the pages: axes cover the data, labels fit and do not overlap, text is escaped."""

import random
import re
from itertools import combinations, pairwise

import pytest
from chromium import TEXT_BOXES, headless_chromium

from tritale.common.charts import BOTTOM, HEIGHT, LINE_HEIGHT, TOP, WIDTH, bar_chart, line_chart, number, render_page, spread, ticks

browser = pytest.fixture(scope="module")(headless_chromium)


@pytest.mark.parametrize("high", [3, 0.42, 209_000, 97, 0, 1e-4])
def test_ticks_are_few_round_and_reach_both_ends(high):
    found = ticks(high)
    assert found[0] == 0 and found[-1] >= high and 2 <= len(found) <= 8
    assert len({round(b - a, 9) for a, b in pairwise(found)}) == 1


def test_labels_keep_apart_and_above_the_axis(seed):
    rng = random.Random(seed)
    for _ in range(100):
        wanted = sorted(rng.uniform(TOP, HEIGHT - BOTTOM) for _ in range(rng.randrange(4)))
        found = spread(wanted)
        assert all(b - a >= LINE_HEIGHT - 1e-9 for a, b in pairwise(found)) and all(y <= HEIGHT - BOTTOM for y in found)
        if all(b - a >= LINE_HEIGHT for a, b in pairwise(wanted)):
            assert found == wanted


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0163, "0.0163"), (5, "5"), (1234, "1,234"), (65_536, "65.54k"), (250_000, "250k"), (2.5e6, "2.5M")]
)
def test_numbers_have_few_characters(value, text):
    assert number(value) == text


def coordinates(chart: str, pattern: str) -> list[list[float]]:
    return [[float(x) for x in re.split(r"[ ,]", match)] for match in re.findall(pattern, chart)]


def test_points_lie_at_their_values():
    chart = line_chart("Loss", "nats", "step", [100, 200, 400], {"a": [4.0, 2.0, 0.0], "b": [1.0]})
    a, b = coordinates(chart, r'points="([^"]*)"')
    (x1, y1, x2, y2, x3, y3), plot_height = a, HEIGHT - TOP - BOTTOM
    assert x3 - x1 == pytest.approx(3 * (x2 - x1), abs=0.2) and y3 == HEIGHT - BOTTOM
    assert y3 - y1 == pytest.approx(plot_height, abs=0.1) and y3 - y2 == pytest.approx(plot_height / 2, abs=0.1)
    assert b == [x1, pytest.approx(y3 - plot_height / 4, abs=0.1)]
    assert coordinates(chart, r'data-xs="([^"]*)"') == [[x1, x2, x3]] and "<title>step 400: a 0</title>" in chart


def test_a_logarithmic_axis_spaces_doublings_evenly():
    chart = line_chart("T", "u", "size", [2048, 4096, 8192], {"a": [1, 1, 1]}, log_x=True)
    ((x1, x2, x3),) = coordinates(chart, r'data-xs="([^"]*)"')
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11) and x1 < x2 and all(label in chart for label in ("2,048", "4,096", "8,192"))


@pytest.mark.parametrize("axis", [60, 7, 20])
def test_labels_of_references_are_beside_the_plot_and_apart(axis):
    chart = line_chart("T", "%", "step", [100, 200], {"model": [axis, axis / 2]}, references={"held-out": 1.63, "threshold": 5.0})
    labels = re.findall(r'class="label" x="([\d.]+)" y="([\d.]+)">([^<]*)<', chart)
    assert [label for _, _, label in labels] == ["threshold 5", "held-out 1.63"]
    (x1, y1, _), (x2, y2, _) = labels
    lines = [float(y) for y in re.findall(r'class="dashed"[^>]* y1="([\d.]+)"', chart)]
    assert float(y2) - float(y1) >= LINE_HEIGHT and x1 == x2
    assert all(abs(float(y) - 3.5 - line) <= LINE_HEIGHT for y, line in zip((y1, y2), lines, strict=True))
    assert max(coordinates(chart, r'points="([^"]*)"')[0][::2]) < float(x1) < WIDTH


def test_bars_have_heights_in_proportion_and_tooltips():
    chart = bar_chart("Length", "documents", "tokens", [("1", "1: 10 documents", 10), ("2", "2: 40 documents", 40), ("3", "none", 0)])
    heights = [float(h) for h in re.findall(r'<rect[^>]* height="([\d.]+)"', chart)]
    assert heights == [pytest.approx(heights[1] / 4, abs=0.1), HEIGHT - TOP - BOTTOM, 0] and "<title>2: 40 documents</title>" in chart


def test_text_is_escaped(tmp_path):
    evil = """a"b'<script>&"""
    charts = [
        line_chart(evil, evil, evil, [1], {evil: [1], "b": [2]}, references={evil: 1}),
        bar_chart(evil, evil, evil, [(evil, evil, 1)]),
    ]
    (tmp_path / "t.html").write_text('{% extends "page.html" %}{% block main %}{{ text }}{{ charts[0] }}{{ charts[1] }}{% endblock %}')
    html = render_page(tmp_path / "t.html", charts=charts, text=evil)
    assert html.count("a&#34;b&#39;&lt;script&gt;&amp;") > 10 and not re.search("<script|a\"b|b'", html)


def test_in_a_browser_no_text_is_outside_its_chart_or_on_another(browser, tmp_path):
    sizes = [2048 * 2**i for i in range(6)]
    share, steps = {"quickstart": [30, 50, 60, 75, 88, 90]}, [10_000 * i for i in range(1, 22)]
    charts = [
        line_chart("Embedding", "%", "vocabulary", sizes, share | {"microstories-44m": [9] * 6}, log_x=True),
        line_chart("T", "u", "vocabulary", [300, 400, 30_000, 60_000], {"a": [1, 2]}, log_x=True),
        line_chart("Validation", "bits", "step", [50_000 * s for s in steps], {"a": [3] * 21}, references={"entropy": 0.443}),
        line_chart("T", "u", "step", steps, {"a": [1_234_567] * 21}, references={"held-out": 1_250_000.0, "threshold": 1_240_000.0}),
        line_chart("One", "u", "step", [3], {"a": [0]}, references={"held-out": 0.0}),
        bar_chart("Length", "documents", "characters", [(f"{2 ** (i / 4):,.0f}", "", 35_000 + i) for i in range(64)]),
        bar_chart("Length", "documents", "characters", [("16,384", "", 1)]),
    ]
    (tmp_path / "t.html").write_text(
        '{% extends "page.html" %}{% block main %}<div class="charts">{% for c in charts %}{{ c }}{% endfor %}</div>{% endblock %}'
    )
    page = tmp_path / "page.html"
    page.write_text(render_page(tmp_path / "t.html", charts=charts), encoding="utf-8")
    browser.get(page.as_uri())
    found = browser.execute_script(TEXT_BOXES)
    assert len(found) == len(charts)
    for boxes in found:
        assert len(boxes) >= 5
        assert all(0 <= left and right <= WIDTH and 0 <= top and bottom <= HEIGHT for left, top, right, bottom in boxes), boxes
        for a, b in combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 1 or b[3] <= a[1] + 1, (a, b)
