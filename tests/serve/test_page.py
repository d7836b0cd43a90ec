"""The page in headless Chromium (Debian: apt install chromium chromium-driver)."""

import base64
import json
import shutil
import time
from pathlib import Path
from random import Random

import pytest

from tests.serve.servers import ENDLESS, IMAGE, SCRIPT, reciting, running, train_tokenizer, wait_until, write_answering, write_checkpoint
from tritale.inference import Decoder
from tritale.instructions.requirements import Requirement
from tritale.instructions.wording import SIMPLIFIED, instruction

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="Chromium or chromedriver not found: apt install chromium chromium-driver")


def start_chromium(profile: Path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    assert BROWSER and DRIVER
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,860", f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Checkpoints that generate HTML, and one that never ends. Each step takes 10 ms, so that streaming is visible."""
    folder, tokenizer = tmp_path_factory.mktemp("page") / "run", train_tokenizer()
    write_checkpoint(folder / "step-00000001", tokenizer, reciting(tokenizer, SCRIPT))
    write_checkpoint(folder / "step-00000002", tokenizer, reciting(tokenizer, IMAGE))
    write_checkpoint(folder / "step-00000003", tokenizer, reciting(tokenizer, ENDLESS, is_endless=True))
    with pytest.MonkeyPatch.context() as patch:
        step = Decoder.step
        patch.setattr(Decoder, "step", lambda self: (time.sleep(0.01), step(self))[1])
        with running(folder) as server:
            yield server


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    driver = start_chromium(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium, server):
    """The page, freshly loaded. After the test: no error in the console, no request to another server."""
    chromium.get("about:blank")
    for kind in ("browser", "performance"):
        chromium.get_log(kind)  # discard earlier entries
    chromium.get(server.url)
    wait_until(lambda: len(chromium.find_elements("css selector", "#model option")) == 3)
    yield chromium
    assert [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith((f"{server.url}/", "data:")) for url in urls), urls
    assert not chromium.execute_script("return document.querySelector('#error:not([hidden])')?.textContent")


def choose(page, **values) -> None:
    for name, value in values.items():
        page.execute_script(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))", name, value
        )


def write(page) -> None:
    page.find_element("id", "write").click()
    wait_until(lambda: stories(page))


def stories(page) -> list[str]:
    return page.execute_script("return [...document.querySelectorAll('article .story')].map(e => e.textContent)")


def is_writing(page) -> bool:
    return bool(page.find_elements("css selector", "article.writing"))


def test_a_story_is_streamed_with_the_settings_chosen(page, server):
    assert page.execute_script("return [...document.querySelectorAll('#model option')].map(e => e.value)") == [
        "step-00000003", "step-00000002", "step-00000001",
    ]  # fmt: skip
    choose(page, prompt="小兔", temperature="0", top_k="0", max_tokens="150", seed="7")
    assert page.find_element("id", "temperature-value").text == "0" and "全部" in page.find_element("id", "top_k-value").text
    write(page)
    wait_until(lambda: len(stories(page)[0]) > 10)
    early = stories(page)[0]
    assert is_writing(page) and not page.find_element("id", "write").is_enabled()
    wait_until(lambda: not is_writing(page))
    late = stories(page)[0]
    assert late.startswith(early) and len(late) > len(early) and late.startswith("小兔" + ENDLESS)
    footer = page.find_element("css selector", "article footer").text
    assert "step-00000003" in footer and "T 0" in footer and "seed 7" in footer and "150 tokens" in footer and "length limit" in footer
    choose(page, max_tokens="5")
    write(page)
    wait_until(lambda: len(stories(page)) == 2 and not is_writing(page))
    assert stories(page)[1] == late and len(stories(page)[0]) < len(late)  # the newest is on top


def test_stop_ends_the_story_and_frees_the_slot(page, server):
    for stop in (lambda: page.find_element("id", "stop").click(), lambda: page.execute_script(
        "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))"
    )):  # fmt: skip
        assert not page.find_element("id", "stop").is_enabled()
        before = server.engine.n_steps
        choose(page, prompt="", max_tokens="500")
        write(page)
        wait_until(lambda: len(stories(page)[0]) > 10)
        stop()
        wait_until(lambda: not is_writing(page))
        wait_until(lambda: server.engine.status()["running"] == 0)
        assert server.engine.n_steps - before < 450 and 10 < len(stories(page)[0]) < 900
        assert "stopped" in page.find_element("css selector", "article footer").text
        assert page.find_element("id", "write").is_enabled()


def test_a_story_is_asked_for_and_what_is_met_is_shown(chromium, tmp_path):
    tokenizer = train_tokenizer()
    write_answering(tmp_path / "run" / "step-00000001", tokenizer, "从前有一只小兔")
    with running(tmp_path / "run") as server:
        chromium.get(server.url)
        wait_until(lambda: chromium.find_elements("css selector", "#model option"))
        assert not chromium.find_element("id", "words").is_displayed()
        chromium.find_element("id", "tab-ask").click()
        assert not chromium.find_element("id", "prompt").is_displayed()
        click = lambda *buttons: [chromium.find_element("css selector", b).click() for b in buttons]
        choose(chromium, words="小兔 <b>苹果</b>", temperature="0", sentence="从前有一只小兔")
        click("[data-for=words] button:nth-child(2)", "[data-for=words] button:nth-child(3)", "[data-for=words] button:nth-child(3)")
        click(
            "#features button:nth-child(1)", "#features button:nth-child(3)", "#length button:nth-child(1)", "#length button:nth-child(2)"
        )
        write(chromium)
        wait_until(lambda: chromium.find_elements("css selector", ".verdicts"))
        asked = chromium.find_element("css selector", ".asked").text.split("\n")
        assert asked == [
            "写一个故事。",
            "词汇：小兔、<b>苹果</b>、皮球",
            "特点：对话",
            "特点：冲突",
            "字数：150到200个字",
            "随机句子：从前有一只小兔",
        ]
        shown = chromium.execute_script("return [...document.querySelectorAll('.verdicts li')].map(e => [e.className, e.textContent])")
        assert shown == [
            ["met", "词汇：小兔"], ["missed", "词汇：<b>苹果</b>"], ["missed", "词汇：皮球"], ["missed", "特点：对话"],
            ["unknown", "特点：冲突"], ["missed", "字数：150到200个字"], ["met", "随机句子：从前有一只小兔"],
        ]  # fmt: skip
        assert stories(chromium) == ["从前有一只小兔"] and not chromium.find_element("id", "error").is_displayed()
        chromium.find_element("id", "tab-continue").click()
        assert chromium.find_element("id", "prompt").is_displayed() and chromium.find_element("id", "temperature").is_displayed()


def test_the_page_asks_in_the_words_that_models_learn(seed):
    """Its fields are those of an instruction that `tritale instruct` writes."""
    rng = Random(seed)
    asked = (Requirement("words", words=("苹果",)), Requirement("length", characters=(200, 250)), Requirement("sentence", "小兔笑了。"))
    wanted = ["写一个故事。", "词汇：苹果", "字数：200到250个字", "随机句子：小兔笑了。"]
    assert any(instruction(asked, SIMPLIFIED, rng).split("\n") == wanted for _ in range(3000))


@pytest.mark.parametrize("step, html", [(1, SCRIPT), (2, IMAGE)])
def test_html_in_a_story_is_text(step, html, page):
    page.execute_script("window.hacked = () => { window.isHacked = true }")
    prompt = "<b>小兔</b><img src=x onerror=hacked()>"
    choose(page, model=f"step-{step:08d}", prompt="", temperature="0")
    write(page)
    wait_until(lambda: not is_writing(page))
    assert stories(page)[0] == html and "the end" in page.find_element("css selector", "article footer").text
    choose(page, prompt=prompt, max_tokens="1")
    write(page)
    wait_until(lambda: len(stories(page)) == 2 and not is_writing(page))
    assert stories(page)[0].startswith(prompt)
    assert page.execute_script("return document.querySelectorAll('article b, article img, article script').length") == 0
    assert page.execute_script("return window.isHacked") is None


def test_an_error_of_the_server_is_shown(chromium, page):
    choose(page, prompt="<i>小兔</i>" * 500)
    page.find_element("id", "write").click()
    wait_until(lambda: chromium.find_element("id", "error").is_displayed())
    assert "shorten" in chromium.find_element("id", "error").text and stories(page) == []
    assert chromium.find_element("id", "empty").is_displayed()
    assert any("400" in entry["message"] for entry in chromium.get_log("browser"))  # Chromium logs the status
    choose(page, prompt="", max_tokens="2")
    write(page)
    wait_until(lambda: not is_writing(page))
    assert not chromium.find_element("id", "error").is_displayed()


def test_the_content_security_policy_blocks_other_scripts_and_servers(chromium, server):
    """HTML that is inserted by mistake can neither run nor request another server."""
    chromium.get(server.url)
    chromium.get_log("browser")
    chromium.execute_script("""
        window.isHacked = false;
        const div = document.createElement('div'), script = document.createElement('script');
        div.innerHTML = '<b onclick="window.isHacked = true">x</b><img src="http://evil.example/x.png">';
        script.textContent = 'window.isHacked = true';
        document.body.append(div, script);
        div.firstChild.click();
    """)
    blocked = []
    wait_until(lambda: blocked.extend(e["message"] for e in chromium.get_log("browser")) or len(blocked) >= 3)
    assert all("Content Security Policy" in message for message in blocked), blocked
    assert chromium.execute_script("return window.isHacked") is False


def screenshot(folder: Path, target: Path) -> None:
    """docs/serve.png: a story that a taught run continues, and one that it is asked for.
    `python -m tests.serve.test_page out/quickstart-taught/sft docs/serve.png`"""
    with running(folder) as server:
        driver = start_chromium(Path("/tmp/tritale-screenshot-profile"))
        try:
            driver.get(server.url)
            wait_until(lambda: driver.find_elements("css selector", "#model option"))
            for is_asked in (False, True):
                if is_asked:
                    driver.find_element("id", "tab-ask").click()
                    driver.find_element("css selector", "#features button:nth-child(1)").click()
                    choose(driver, words="苹果、高兴", people="小兔")
                choose(driver, seed="1")
                driver.find_element("id", "write").click()
                wait_until(lambda: stories(driver) and not is_writing(driver))
            driver.set_window_size(1280, 1080)
            driver.execute_script("window.scrollTo(0, 0)")
            image = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
            target.write_bytes(base64.b64decode(image))
        finally:
            driver.quit()


if __name__ == "__main__":
    import sys

    screenshot(Path(sys.argv[1]), Path(sys.argv[2]))
