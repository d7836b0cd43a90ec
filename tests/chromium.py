"""A headless Chromium, for the tests of the pages."""

import shutil
from collections.abc import Iterator

import pytest


def headless_chromium() -> Iterator:
    """Yield a driver and quit it at the end. Skips the test if selenium, chromium or chromedriver is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install selenium)")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1240,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


# For `execute_script`: the boxes [left, top, right, bottom] of all texts of each chart, in the chart's coordinates.
TEXT_BOXES = """return [...document.querySelectorAll('svg.chart')].map(s => [...s.querySelectorAll('text')].map(t => {
const b = t.getBBox(); return [b.x, b.y, b.x + b.width, b.y + b.height]}))"""
