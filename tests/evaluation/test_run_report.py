"""report.html: in a browser nothing is fetched, nothing fails, it fits a phone, and what a model wrote is text."""

import json
import re
from itertools import combinations

import pytest
from chromium import TEXT_BOXES, headless_chromium
from made_runs import made_run

from tritale.common.charts import HEIGHT, WIDTH
from tritale.evaluation.run_facts import RunFacts
from tritale.evaluation.run_report import POINTS, page, sample_steps, write_report

browser = pytest.fixture(scope="module")(headless_chromium)

EVIL = '<script>document.title = "owned"</script><img src="https://example.com/x.png" onerror="document.title=1">&lt;b&gt;{{ 7 * 7 }}'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 20,000 steps with 400 lines, samples at many steps, and a diagnosis."""
    out_dir = made_run(
        tmp_path_factory.mktemp("report") / "run", samples=(EVIL, "从前有一只小兔。" * 9), columns={"bad_steps": lambda step: step // 10}
    )
    with (out_dir / "samples.jsonl").open("a", encoding="utf-8") as file:
        for step in range(20_100, 29_100, 100):
            file.write(json.dumps({"step": step, "prompt": EVIL, "text": f"第{step}步" + "长" * 5000}) + "\n")
    write_report(out_dir)
    return out_dir


def test_in_a_browser_nothing_is_fetched_nothing_fails_and_a_script_in_a_sample_is_text(browser, run):
    url = (run / "report.html").as_uri()
    browser.get_log("performance")
    browser.get(url)
    assert browser.title == "run – step 20,000" and browser.get_log("browser") == []
    events = "\n".join(e["message"] for e in browser.get_log("performance"))
    requests = re.findall(r'"method":"Network\.requestWillBeSent".*?"url":"([^"]*)"', events)
    assert requests and all(address.startswith((url, "data:")) for address in requests), requests
    assert not browser.find_elements("css selector", "script, main img, .story *:not(b)")
    assert browser.find_element("css selector", "details .story").text.startswith(EVIL)
    assert "2,000 of 20,000 steps were skipped" in browser.find_element("css selector", ".findings").text
    titles = [e.text.split("\n")[0] for e in browser.find_elements("css selector", "figcaption")]
    wanted = ["Loss", "Loss, second half", "Validation", "Learning rate", "Gradient norm", "Throughput", "Memory", "Bad steps"]
    assert len(titles) == len(wanted) and all(title.startswith(name) for title, name in zip(titles, wanted, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_no_label_is_on_another(browser, run, scheme):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        browser.get((run / "report.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360
        brightness = browser.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (max(brightness) < 60) == (scheme == "dark")
        size = browser.execute_script("return parseFloat(getComputedStyle(document.querySelector('.story')).fontSize)")
        assert size >= 14
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    for boxes in browser.execute_script(TEXT_BOXES):
        assert all(0 <= left and right <= WIDTH and 0 <= top and bottom <= HEIGHT for left, top, right, bottom in boxes), boxes
        for a, b in combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 1 or b[3] <= a[1] + 1, (a, b)


def test_long_runs_make_small_pages(run):
    html = (run / "report.html").read_text(encoding="utf-8")
    lines = re.findall(r'points="([^"]*)"', html)
    assert len(lines) == 12 and all(len(line.split()) <= POINTS for line in lines)
    assert html.count("长") <= 31 * 3000 and len(html) < 250_000
    shown, left_out = sample_steps(RunFacts.read(run))
    assert len(shown) == 30 and left_out == 61 and shown[0][0] == 29_000 and shown[-1][0] == 20_000
    assert f"{left_out} more steps with samples" in html


def test_highs_and_lows_between_the_points_are_kept(tmp_path):
    speed = lambda step: 10.0 if step == 10_000 else 130_000.0
    run = made_run(tmp_path / "run", columns={"grad_norm": lambda step: 77.0 if step == 10_000 else 0.5, "tokens_per_second": speed})
    html = page(RunFacts.read(run))
    norm, throughput = (re.findall(rf">{title} .*?</figure>", html, re.S)[0] for title in ("Gradient norm", "Throughput"))
    ys = lambda figure: [[float(y) for y in re.findall(r",([\d.]+)", line)] for line in re.findall(r'points="([^"]*)"', figure)]
    median, highest = ys(norm)
    assert min(highest) < min(median) - 50  # y points down; a point stands for two lines
    median, lowest = ys(throughput)
    assert max(lowest) > max(median) + 50


def test_a_run_without_a_line_and_one_without_a_record_have_a_page(tmp_path, tiny_run):
    made_run(tmp_path / "run", until=1, end="killed")
    assert "step 0 of 20,000" in page(RunFacts.read(tmp_path / "run"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_bytes((tiny_run / "metrics.jsonl").read_bytes())
    assert "step 6" in page(RunFacts.read(tmp_path / "old"))


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    made_run(tmp_path / "run", until=1, end="killed")
    monkeypatch.setattr("tritale.evaluation.run_report.page", lambda facts: 1 / 0)
    said = []
    write_report(tmp_path / "run", warn=said.append)
    assert said == [f"{tmp_path / 'run' / 'report.html'} could not be written (ZeroDivisionError: division by zero)"]
    assert not (tmp_path / "run" / "report.html").exists()
