"""An evaluation counts what the models' own stories meet, and shows it in the terminal, in JSON and on a page."""

import json
import re
import shutil

import pytest
from chromium import headless_chromium
from jinja2 import UndefinedError

from tritale.cli.main import main
from tritale.common.files import write_json
from tritale.data.chat import CHAT_TEMPLATE
from tritale.evaluation.instructions import counts, rate
from tritale.evaluation.instructions_page import marked, missed, page
from tritale.evaluation.measures import wilson_interval
from tritale.inference import LLM
from tritale.instructions.requirements import Requirement, Verdict
from tritale.instructions.samples import Sample, read_samples, write_samples

browser = pytest.fixture(scope="module")(headless_chromium)

EVIL = '<script>document.title = "owned"</script><img src="https://example.com/x.png" onerror="document.title=1">&lt;b&gt;{{ 7 * 7 }}'
SHORT = ["--max-new-tokens", "12", "--validation-documents", "4"]


def sample(story: str, *requirements: Requirement, instruction: str = "写一个故事。") -> Sample:
    messages = ({"role": "user", "content": instruction}, {"role": "assistant", "content": story})
    return Sample(messages, requirements, is_built_in=True)


WORD, PLACE, LENGTH = (Requirement("words", words=("小狗", "公园")), Requirement("place", "公园"), Requirement("length", characters=(1, 9)))
MORAL = Requirement("feature", "寓意")


@pytest.fixture
def chat_run(tiny_run, tmp_path):
    """A copy of the tiny run whose tokenizer has the chat template, as after training on conversations."""
    folder = shutil.copytree(tiny_run, tmp_path / "chat", ignore=shutil.ignore_patterns("checksums.json"))
    for path in folder.glob("step-*/tokenizer_config.json"):
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"chat_template": CHAT_TEMPLATE})
    return folder


@pytest.fixture
def instructions(tmp_path):
    path = tmp_path / "held_out.jsonl"
    stories = ("从前，小狗去公园。", "小兔笑了。", "小猫走了，天黑了。")
    write_samples(path, [sample(s, WORD, LENGTH) if i else sample(s, PLACE) for i, s in enumerate(stories)])
    return path


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (5, 10, 0.2366, 0.7634), (90, 100, 0.8256, 0.9448)]
)
def test_intervals_are_those_of_wilson(k, n, low, high):
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=1e-4)


def test_requirements_are_counted_by_kind_by_feature_and_together():
    samples = [sample("", WORD), sample("", PLACE, WORD), sample("", LENGTH, MORAL), sample("", PLACE)]
    found = counts(samples, ["小狗在公园。", "小狗。", "小兔走了。" * 3 + "天黑了", "公园"])
    kinds = {kind: (r["met"], r["of"], r["share"]) for kind, r in found["kinds"].items() if r}
    assert kinds == {"words": (1, 2, 0.75), "place": (1, 2, 0.5), "length": (0, 1, 0.5), "feature": (0, 1, 0)}
    assert {f: r["of"] for f, r in found["features"].items() if r} == {"寓意": 1}
    assert {n: (r["met"], r["of"]) for n, r in found["together"].items()} == {"1": (2, 2), "2": (0, 2)}


def test_what_cannot_be_judged_is_left_out():
    assert rate([Verdict(None, None)]) is None
    assert (rate([Verdict(None, None), Verdict(True, 1.0)]) or {})["of"] == 1
    other = Sample(sample("", MORAL, WORD).messages, (MORAL, WORD))
    found = counts([other], ["小狗在公园。"])
    assert found["features"]["寓意"] is None and found["together"] == {} and found["kinds"]["words"]["met"] == 1


def test_each_model_answers_the_same_instructions_with_its_own_stories(tiny_run, chat_run, instructions, tmp_path, seed, capsys):
    out = tmp_path / "out"
    models = [tiny_run / "step-00000003", tiny_run, chat_run]
    main(["evaluate", *map(str, models), "--instructions", str(instructions), "--out", str(out), *SHORT, "--seed", str(seed)])
    report = json.loads((out / "evaluate.json").read_text(encoding="utf-8"))
    samples = read_samples(instructions)
    assert [row["model"] for row in report["models"]] == list(map(str, models))
    assert [row["is_asked"] for row in report["models"]] == [False, False, True]
    for folder, row in zip(models, report["models"], strict=True):
        llm = LLM.load(folder, device="cpu")
        prompts = [s.prompt if row["is_asked"] else "" for s in samples]
        alone = [llm.complete([p], max_new_tokens=12, seed=seed + i)[0].text for i, p in enumerate(prompts)]
        assert [story["text"] for story in row["stories"]] == alone
        assert [[tuple(v.values()) for v in s["verdicts"]] for s in row["stories"]] == [
            s.judge(t) for s, t in zip(samples, alone, strict=True)
        ]
        assert {key: row[key] for key in ("kinds", "together")} == {
            key: value for key, value in counts(samples, alone).items() if key in ("kinds", "together")
        }
    bits = [row["bits_per_char"] for row in report["models"]]
    assert bits[1] == bits[2] != bits[0]
    assert report["reference"]["kinds"]["place"]["rate"] == 1 and report["by_chance"]["kinds"]["place"]["rate"] == 0
    printed = capsys.readouterr().out
    assert "(not" in printed and "words 词汇" in printed and "2 requirements" in printed


def test_instructions_are_made_from_the_data_of_the_first_model(tiny_run, tmp_path):
    with pytest.raises(SystemExit, match="longer than the context of 64 tokens"):  # the tiny model's
        main(["evaluate", str(tiny_run), "--out", str(tmp_path), *SHORT])
    with pytest.raises(SystemExit, match="held-out is 0"):
        main(["evaluate", str(tiny_run), "--out", str(tmp_path), "--held-out", "0"])
    moved = shutil.copytree(tiny_run, tmp_path / "moved", ignore=shutil.ignore_patterns("data"))
    with pytest.raises(SystemExit, match=r"data of the models is missing .*give its folder as --data"):
        main(["evaluate", str(moved), *SHORT])
    with pytest.raises(SystemExit, match="is not a folder"):
        main(["evaluate", str(tmp_path / "nowhere")])


def test_a_second_evaluation_replaces_only_its_own_files(tiny_run, instructions, tmp_path):
    command = ["evaluate", str(tiny_run), "--instructions", str(instructions), "--out", str(tmp_path), *SHORT]
    main(command)
    first = (tmp_path / "evaluate.json").read_bytes()
    with pytest.raises(SystemExit, match=r"an earlier evaluation wrote .*; give --overwrite"):
        main(command)
    main([*command, "--overwrite"])
    assert (tmp_path / "evaluate.json").read_bytes() == first
    (tmp_path / "evaluate.html").write_text("my own notes", encoding="utf-8")
    with pytest.raises(SystemExit, match="not the result of tritale evaluate"):
        main([*command, "--overwrite"])
    assert (tmp_path / "evaluate.html").read_text(encoding="utf-8") == "my own notes"


def test_instructions_without_requirements_or_longer_than_the_context_are_said(chat_run, tmp_path):
    path = tmp_path / "x.jsonl"
    for samples, message in (
        ([sample("从前。")], "there is nothing to judge"),
        ([sample("从前。", WORD, instruction="小狗" * 99)], "context 64"),
    ):
        write_samples(path, samples)
        with pytest.raises(SystemExit, match=message):
            main(["evaluate", str(chat_run), "--instructions", str(path), *SHORT])


def test_what_was_asked_for_is_marked():
    requirements = [WORD.to_json(), LENGTH.to_json(), Requirement("sentence", "小狗笑了。").to_json()]
    assert marked("公园里，小狗笑了。", requirements) == [("公园", True), ("里，", False), ("小狗笑了。", True)]
    assert marked("天黑了", requirements) == [("天黑了", False)] and marked("", requirements) == []
    story = {"verdicts": [Verdict(False, 0.5)._asdict(), Verdict(True, 1)._asdict(), Verdict(None, None)._asdict()]}
    assert missed({"requirements": requirements}, story) == "words"


def report() -> dict:
    samples = [sample("从前。", WORD, instruction=EVIL), sample("小狗", MORAL), sample("公园", PLACE, LENGTH)]
    texts = {EVIL: [EVIL, "小狗懂得了：", "公园"], "out/sft": ["小狗在公园里。", "天黑了。", "山洞"]}
    numbers = {
        "repeated_4grams": 0.2, "length": 12.0, "ends_properly": 0.5, "consistent": None, "coherent": 0.25, "overlap": 20.0,
        "distinct_3": 0.7,
    }  # fmt: skip

    def row(name: str) -> dict:
        verdicts = [[v._asdict() for v in s.judge(t)] for s, t in zip(samples, texts[name], strict=True)]
        stories = [{"text": t, "verdicts": v, "is_coherent": False} for t, v in zip(texts[name], verdicts, strict=True)]
        head = {"model": name, "is_asked": name != EVIL, "bits_per_char": 0.5}
        return head | counts(samples, texts[name]) | numbers | {"stories": stories}

    return {
        "data": "out/<b>", "instructions": 3, "sampling": {"temperature": 0.8, "top_k": 30, "top_p": 0.9}, "seed": 0,
        "validation": {"documents": 4, "characters": 900}, "checks_cast": False, "shortest_coherent": 100,
        "samples": [{"instruction": s.prompt[0]["content"], **s.to_json()} for s in samples],
        "by_chance": counts(samples, ["", "", ""]), "reference": counts(samples, [s.story for s in samples]) | numbers,
        "models": [row(name) for name in texts],
    }  # fmt: skip


def test_in_a_browser_nothing_is_fetched_nothing_fails_and_a_script_in_a_story_is_text(browser, tmp_path):
    path = tmp_path / "evaluate.html"
    path.write_text(page(report()), encoding="utf-8")
    browser.get_log("performance")
    browser.get(path.as_uri())
    assert browser.title == "Instructions: out/sft" and browser.get_log("browser") == []
    events = "\n".join(e["message"] for e in browser.get_log("performance"))
    requests = re.findall(r'"method":"Network\.requestWillBeSent".*?"url":"([^"]*)"', events)
    assert requests and all(url.startswith((path.as_uri(), "data:")) for url in requests), requests
    assert browser.find_element("class name", "asked").text == EVIL == browser.find_element("class name", "story").text
    assert not browser.find_elements("css selector", "main img, main script")
    cells = [[cell.text for cell in row.find_elements("tag name", "td")] for row in browser.find_elements("css selector", "tbody tr")]
    assert ["words 词汇", "1", "0% (0–79)", "100% (21–100)", "0% (0–79)", "0%"] in cells
    assert [mark.text for mark in browser.find_elements("css selector", ".card:nth-of-type(1) mark")] == ["小狗", "公园"]


def test_the_stories_can_be_filtered_by_what_was_asked_for_and_missed(browser, tmp_path):
    path = tmp_path / "evaluate.html"
    path.write_text(page(report()), encoding="utf-8")
    browser.get(path.as_uri())

    def shown(kind: str, state: str) -> str:
        for name, value in (("kind", kind), ("state", state)):
            browser.find_element("css selector", f"#{name} option[value='{value}']").click()
        assert len([card for card in browser.find_elements("class name", "card") if card.is_displayed()]) == int(count().split()[0])
        return count()

    count = lambda: browser.find_element("id", "count").text
    assert shown("", "") == "3 of 3" and shown("words", "") == "1 of 3" and shown("people", "") == "0 of 3"
    assert shown("", "missed") == "2 of 3" and shown("", "met") == "1 of 3"
    assert shown("length", "met") == "1 of 3" and shown("place", "met") == "0 of 3" and shown("place", "missed") == "1 of 3"


@pytest.mark.parametrize("width", [390, 1240])
def test_the_page_fits_into_the_window(browser, tmp_path, width):
    path = tmp_path / "evaluate.html"
    path.write_text(page(report()), encoding="utf-8")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
    browser.get(path.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_report_without_a_figure_is_not_written():
    broken = report()
    del broken["models"][0]["stories"]
    with pytest.raises(UndefinedError):
        page(broken)
