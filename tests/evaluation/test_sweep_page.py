"""The page of a sweep, as a browser shows it: everything there, nothing fetched, no error, and what a model wrote is text."""

import math
import re

import pytest
from chromium import TEXT_BOXES, headless_chromium
from jinja2 import UndefinedError

from tritale.common.charts import WIDTH
from tritale.evaluation.sweep_page import chart, csp_hash, page, pieces, write_sweep

browser = pytest.fixture(scope="module")(headless_chromium)

EVIL = '<script>document.title = "owned"</script><img src="https://example.com/x.png" onerror="document.title=1">&lt;b&gt;{{ 7 * 7 }}'


def story(prompt: str, sample: int, text: str) -> dict:
    return {
        "prompt": prompt, "sample": sample, "text": text, "tokens": 9, "repeated_4grams": 0.5, "loop": [1, 11, "送给"],
        "ends_properly": False, "overlap": [0, 5], "cast": {"heroes": ["小兔"], "adults": [], "things": [], "strangers": []},
        "is_consistent": True, "is_coherent": False,
    }  # fmt: skip


def report(**changes) -> dict:
    numbers = {
        "repeated_4grams": 0.2, "longest_loop": 12.5, "longest_loop_max": 40, "length": 120.0, "ends_properly": 0.5, "consistent": 0.5,
        "coherent": 0.25, "overlap": 20.0, "overlap_max": 33, "distinct_1": 0.2, "distinct_2": 0.5, "distinct_3": 0.7,
    }  # fmt: skip
    rows = []
    for k, step in enumerate((100, 200, 400)):
        texts = [f"他送给送给送给送给送给我，第{step}步，第{i}个。" for i in range(2)]
        stories = [story(p, i, text) for p in ("从前，", EVIL) for i, text in enumerate(texts)]
        stories[2]["text"] = EVIL
        rows.append({"step": step, "val_loss": 2.0, "val_bits_per_char": 3.0 - k, **numbers, "stories": stories})
    return {
        "run": "out/<b>run</b>", "prompts": ["从前，", EVIL], "samples": 2, "seed": 0,
        "sampling": {"temperature": 0.8, "top_k": 30, "top_p": 0.9},
        "validation": {"documents": 8, "of_documents": 80, "characters": 2000, "entropy_bits_per_char": 0.4},
        "overlap": {"characters": 10, "of_characters": 20}, "checks_cast": True, "shortest_coherent": 112,
        "left_out": {"step-00000300": EVIL}, "reference": numbers,
        "findings": ["Repetition falls below 5% from step 60,000 on.", EVIL], "checkpoints": rows,
    } | changes  # fmt: skip


def shown(browser, side: str) -> list[str]:
    return [e.text for e in browser.find_elements("css selector", f"#stories-{side} .story")]


def test_in_a_browser_nothing_is_fetched_nothing_fails_and_a_script_in_a_story_is_text(browser, tmp_path):
    path = tmp_path / "sweep.html"
    path.write_text(page(report()), encoding="utf-8")
    browser.get_log("performance")
    browser.get(path.as_uri())
    assert browser.title == "Sweep of out/<b>run</b>"  # the story's script did not run
    assert browser.get_log("browser") == []
    events = "\n".join(e["message"] for e in browser.get_log("performance"))
    requests = re.findall(r'"method":"Network\.requestWillBeSent".*?"url":"([^"]*)"', events)
    assert requests and all(url.startswith((path.as_uri(), "data:")) for url in requests), requests
    assert shown(browser, "a")[1] == EVIL + EVIL  # prompt and story, letter by letter
    assert not browser.find_elements("css selector", "main img, main script, .story *:not(b):not(span)")
    assert "{{ 7 * 7 }}" in browser.find_element("css selector", ".findings").text and EVIL in browser.find_element("tag name", "body").text


def test_the_sliders_put_two_checkpoints_side_by_side(browser, tmp_path):
    path = tmp_path / "sweep.html"
    path.write_text(page(report()), encoding="utf-8")
    browser.get(path.as_uri())
    assert "第100步，第0个" in shown(browser, "a")[0] and "第400步，第0个" in shown(browser, "b")[0]
    browser.find_element("id", "next").click()
    assert "第100步，第1个" in shown(browser, "a")[0] and "sample 2 of 2" in browser.find_element("id", "sample").text
    browser.find_element("id", "slide-a").send_keys("\ue014")  # the right arrow key
    assert "第200步" in shown(browser, "a")[0] and "第400步" in shown(browser, "b")[0]
    cursor, chart = browser.find_element("css selector", ".cursor-a"), browser.find_element("css selector", "svg.chart")
    assert cursor.get_attribute("x1") == chart.get_attribute("data-xs").split()[1]
    for option in browser.find_elements("css selector", "#pick-b option")[:1]:
        option.click()
    assert "第100步" in shown(browser, "b")[0] and browser.find_element("id", "slide-b").get_attribute("value") == "0"
    assert len(browser.find_elements("css selector", "svg.chart polyline")) == 11
    assert "".join(e.text for e in browser.find_elements("css selector", "#stories-b article:first-child .loop")) == "送给送给送给送给送给"


def test_one_checkpoint_and_data_without_a_cast_make_a_page_too():
    whole = report()
    rows = whole["checkpoints"][:1]
    rows[0]["consistent"] = None
    for s in rows[0]["stories"]:
        s |= {"cast": None, "is_consistent": None, "loop": None}
    html = page(report(checkpoints=rows, checks_cast=False, left_out={}, reference=whole["reference"] | {"consistent": None}))
    assert html.count("<polyline") == 10 and "consistent cast" not in html and "<script>document" not in html


def test_a_report_that_cannot_be_json_or_a_page_leaves_no_file(tmp_path):
    paths = tmp_path / "sweep.json", tmp_path / "sweep.html"
    lacking = {key: value for key, value in report().items() if key != "findings"}
    for bad, error in ((report(seed=math.nan), ValueError), (lacking, UndefinedError)):
        with pytest.raises(error):
            write_sweep(bad, *paths)
        assert not list(tmp_path.iterdir())
    write_sweep(report(), *paths)
    assert all(path.is_file() for path in paths)


def test_only_the_pages_own_script_may_run():
    html = page(report())
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert f"script-src '{csp_hash(script)}'" in html and "default-src 'none'" in html
    assert not re.findall(r'(?:src|href|action)="(?!data:)', html)


def test_marks_cut_the_text_without_changing_it():
    found = pieces({"text": "他送给送给送给送给送给我，好。", "overlap": [0, 5], "loop": [1, 11, "送给"]})
    assert "".join(text for text, _ in found) == "他送给送给送给送给送给我，好。"
    assert [(t, m) for t, m in found if m] == [("他", "copy"), ("送给送给", "copy loop"), ("送给送给送给", "loop")]


def test_each_single_line_is_compared_with_held_out_stories():
    rows = [{"step": step, "repeated_4grams": 0.6 / step, "val_bits_per_char": 3.0} for step in (100, 200)]
    repetition = chart(rows, {"repeated_4grams": 0.0163}, 0.4, "Repeated", "% of all", {"repeated_4grams": "model"})
    assert re.findall(r'class="label"[^>]*>([^<]*)', repetition) == ["threshold 5", "held-out 1.63"]
    validation = chart(rows, {}, 0.4, "Validation", "bits", {"val_bits_per_char": "validation"})
    assert re.findall(r'class="label"[^>]*>([^<]*)', validation) == ["entropy 0.4"]


def test_in_a_browser_no_label_is_on_another_or_outside_its_chart(browser, tmp_path):
    path = tmp_path / "sweep.html"
    whole = report()
    for row in whole["checkpoints"]:
        row["repeated_4grams"] = 0.6
    path.write_text(page(whole | {"reference": whole["reference"] | {"repeated_4grams": 0.0163, "length": 1234.0}}), encoding="utf-8")
    browser.get(path.as_uri())
    boxes = browser.execute_script(TEXT_BOXES.replace("'text'", "'.label'"))
    assert [len(labels) for labels in boxes] == [1, 2, 1, 0, 0, 1, 1]
    assert all(right <= WIDTH for labels in boxes for _, _, right, _ in labels)
