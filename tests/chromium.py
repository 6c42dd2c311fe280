"""Chromium without a window, and hands on the page, for the browser tests and the picture in the documentation."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image


PATIENCE = 300
"""Seconds, as two cores may be busy with other things."""
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def missing() -> str:
    """What is not installed of what is needed; empty where all is."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not found" if absent else ""


@contextmanager
def browser(width: int, height: int) -> Iterator[Any]:
    """A browser of that size in pixels that has never been used."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            # The window has a least width that phones are narrower than.
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            yield driver
        finally:
            driver.quit()


def open_page(driver: Any, server: str) -> None:
    driver.get(server)
    until(driver, lambda: driver.find_elements("css selector", ".mos-stage"))


def until(driver: Any, holds: Any) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, PATIENCE, poll_frequency=0.2).until(lambda _: holds())


def one(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def drag(driver: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Press, move and let go on the canvas, at fractions of it."""
    from selenium.webdriver import ActionChains

    stage = one(driver, ".mos-stage")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
    width, height = stage.size["width"], stage.size["height"]
    (x, y), (to_x, to_y) = [((fx - 0.5) * width, (fy - 0.5) * height) for fx, fy in (start, end)]
    actions = ActionChains(driver, duration=50).move_to_element_with_offset(stage, int(x), int(y)).click_and_hold()
    actions.move_by_offset(int((to_x - x) / 2), int((to_y - y) / 2))
    actions.move_by_offset(int(to_x - x) - int((to_x - x) / 2), int(to_y - y) - int((to_y - y) / 2))
    actions.release().perform()


def boxes(driver: Any) -> list[list[float]]:
    """Edges of the boxes as the number fields tell them, in percent."""
    rows = driver.find_elements("css selector", ".mos-row")
    return [
        [float(field.get_property("value")) for field in row.find_elements("css selector", "[data-edge]")]
        for row in rows
    ]


def write(driver: Any, label: str, text: str) -> None:
    field = one(driver, f"[aria-label={json.dumps(label)}]")
    field.clear()
    field.send_keys(text)


def draw(driver: Any, prompt: str) -> np.ndarray:
    """Type the global prompt, press the button, wait for another picture, and look at it."""
    shown = lambda: [each.get_attribute("src") for each in driver.find_elements("css selector", "#picture img")]  # noqa: E731
    before = shown()
    field = one(driver, "textarea[placeholder^='a dog and a vase']")
    field.clear()
    field.send_keys(prompt)
    one(driver, "#draw").click()
    (source,) = until(driver, lambda: shown() if shown() and shown() != before else None)
    return pixels(driver, source)


def pixels(driver: Any, source: str) -> np.ndarray:
    with urllib.request.urlopen(source) as answer, Image.open(io.BytesIO(answer.read())) as image:
        return np.asarray(image.convert("RGB")).astype(int)
