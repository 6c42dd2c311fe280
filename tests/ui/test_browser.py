"""The page in a real browser: drawn with the mouse, and with the keyboard alone.

pytest -m browser tests/ui
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.version import Version

from chromium import boxes, browser, drag, draw, missing, one, open_page, until, write
from diffusers_mixofshow.ui import page
from diffusers_mixofshow.ui.session import Studio
from diffusers_mixofshow.versions import installed_version


pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]


@pytest.fixture(scope="module")
def server(studio: Studio) -> Iterator[str]:
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    blocks = page.build_page(studio)
    _, url, _ = blocks.launch(
        **page.get_launch_settings(), server_name="127.0.0.1", prevent_thread_lock=True, quiet=True
    )
    yield url
    blocks.close()


@pytest.fixture(scope="module", params=[1280, 400], ids=["wide", "phone"])
def window(request: pytest.FixtureRequest) -> Iterator[Any]:
    with browser(request.param, 1000) as driver:
        yield driver


@pytest.fixture
def seen(window: Any, server: str) -> Any:
    """The page, loaded anew."""
    open_page(window, server)
    return window


def set_number(driver: Any, label: str, value: str) -> None:
    from selenium.webdriver.common.keys import Keys

    field = one(driver, f"input[aria-label='{label}']")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(value)


def test_two_boxes_are_drawn_with_the_mouse_and_the_picture_changes_in_them(seen: Any) -> None:
    set_number(seen, "Steps", "4")
    plain = draw(seen, "a meadow")
    drag(seen, (0.02, 0.3), (0.48, 0.98))
    drag(seen, (0.52, 0.3), (0.98, 0.98))
    assert np.abs(np.array(boxes(seen)) - [[2, 30, 48, 98], [52, 30, 98, 98]]).max() < 2.5
    write(seen, "Prompt of region 1", "a brown dog in a meadow")
    write(seen, "Prompt of region 2", "a red vase in a meadow")
    changed = np.abs(draw(seen, "a meadow") - plain).mean(axis=-1)
    for part in (changed[20:62, 2:30], changed[20:62, 34:62]):
        assert part.mean() > 10
        assert part.mean() > changed[:12].mean()
    assert problems(seen) == []


def test_a_small_picture_is_shown_large_with_crisp_pixels(seen: Any) -> None:
    set_number(seen, "Steps", "2")
    draw(seen, "a meadow")
    picture = one(seen, "#picture img")
    assert picture.get_property("naturalWidth") == 64
    assert picture.value_of_css_property("image-rendering") == "pixelated"
    assert 200 < picture.size["width"] == picture.size["height"]


def test_an_error_is_told_at_the_top_and_marks_no_innocent_field(seen: Any) -> None:
    one(seen, "#draw").click()  # without a prompt
    until(seen, lambda: "no prompt" in one(seen, "body").text)
    marked = seen.find_elements("css selector", "span.error:not(.toast-title)")
    picture = seen.find_elements("css selector", "#picture span.error")
    assert len(marked) == len(picture) == 1


def test_an_error_goes_when_the_user_tries_again(seen: Any) -> None:
    set_number(seen, "Steps", "2")
    one(seen, "#draw").click()
    until(seen, lambda: told(seen))
    draw(seen, "a meadow")
    until(seen, lambda: not told(seen))


def test_an_error_goes_by_itself_after_the_time_to_read_it(seen: Any) -> None:
    one(seen, "#draw").click()
    until(seen, lambda: told(seen))
    begun = time.monotonic()
    until(seen, lambda: not told(seen))
    assert 5 < time.monotonic() - begun


def test_what_is_loaded_is_offered_when_the_tab_for_fusing_is_opened(seen: Any, packs: dict[str, Path]) -> None:
    one(seen, "input[type='file'][multiple]").send_keys(str(packs["rex"]))
    until(seen, lambda: "<rex>" in one(seen, "body").text)
    open_tab(seen, "Fuse")
    until(seen, lambda: [each for each in shown(seen, "label") if each.text == "rex"])


@pytest.mark.skipif(
    Version(installed_version("gradio") or "0") < Version("6.31"),
    reason="Gradio 6.6 tells screen readers nothing; 6.31, which the suite pins, does",
)
def test_screen_readers_hear_words(seen: Any) -> None:
    set_number(seen, "Steps", "2")
    seen.execute_script(
        """window.heard = []; new MutationObserver(() => window.heard.push(
        ...[...document.querySelectorAll('[role=status].sr-only')].map((each) => each.textContent)))
        .observe(document.body, {subtree: true, childList: true, characterData: true})"""
    )
    draw(seen, "a meadow")
    heard = until(seen, lambda: (words := seen.execute_script("return window.heard")) and "Done" in words and words)
    assert not [each for each in heard if "common." in each]


def test_a_name_that_cannot_be_loaded_can_be_corrected(seen: Any) -> None:
    field = one(seen, "[placeholder='user/edlora-potter']")
    field.send_keys("/nowhere/rex")
    seen.find_element("xpath", "//button[normalize-space()='Load']").click()
    until(seen, lambda: "/nowhere/rex does not exist" in one(seen, "body").text)
    time.sleep(0.5)  # Gradio marks its part of the page a moment later than it tells the error
    field.click()  # raises where a mark covers it
    field.send_keys("-2")
    assert field.get_property("value") == "/nowhere/rex-2"


def test_a_box_is_moved_resized_and_removed_with_the_mouse(seen: Any) -> None:
    drag(seen, (0.1, 0.1), (0.4, 0.4))
    drag(seen, (0.25, 0.25), (0.55, 0.35))
    assert np.abs(np.array(boxes(seen)) - [[40, 20, 70, 50]]).max() < 3
    drag(seen, (0.698, 0.498), (0.9, 0.9))
    assert np.abs(np.array(boxes(seen)) - [[40, 20, 90, 90]]).max() < 3
    one(seen, "[aria-label='Remove of region 1']").click()
    assert boxes(seen) == []


def test_a_number_that_a_box_cannot_have_leaves_it_as_it_was(seen: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    def enter(selector: str, text: str) -> Any:
        field = one(seen, selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.BACKSPACE, text)
        return field

    def said() -> Any:
        return one(seen, ".mos-live").text

    def width() -> Any:
        return one(seen, ".mos-box").get_attribute("aria-label")

    drag(seen, (0.1, 0.1), (0.6, 0.6))
    drawn, told_before = boxes(seen), width()
    write(seen, "Name of region 1", "dog")
    told_before = told_before.replace("Region 1", "dog")
    field = enter("[aria-label='Left of region 1']", "150")
    assert width() == told_before
    assert re.fullmatch(r"dog stays as it was: got 150 for left, expected 0 to 5\d(\.\d)? %", said())
    field.send_keys(Keys.TAB)
    assert (boxes(seen), width()) == (drawn, told_before)
    assert "got 150 for left" in said()
    enter("[aria-label='Left of region 1']", "90").send_keys(Keys.TAB)
    assert re.fullmatch(r"dog stays as it was: got 90 for left, expected 0 to 5\d(\.\d)? %", said())
    enter("[aria-label='Bottom of region 1']", "").send_keys(Keys.TAB)
    assert re.fullmatch(r"dog stays as it was: got no number for bottom, expected 1\d(\.\d)? to 100 %", said())
    assert boxes(seen) == drawn
    enter("[aria-label='Left of region 1']", "15").send_keys(Keys.TAB)
    assert (said(), boxes(seen)) == ("", [[15.0, *drawn[0][1:]]])
    enter("[data-size='width']", "5000").send_keys(Keys.TAB)
    assert said() == "The width stays: got 5000, expected 8 to 2048"
    assert one(seen, "[data-size='width']").get_property("value") == "64"


def test_the_canvas_stays_where_it_is_after_a_box_is_drawn(seen: Any) -> None:
    whole = {"width": seen.execute_script("return innerWidth"), "height": 1000, "deviceScaleFactor": 1}
    seen.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", whole | {"height": 500, "mobile": False})
    drag(seen, (0.1, 0.1), (0.6, 0.6))  # puts the canvas into the middle of the window first
    top = seen.execute_script("return document.querySelector('.mos-stage').getBoundingClientRect().top")
    seen.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", whole | {"mobile": False})
    assert seen.switch_to.active_element.get_attribute("aria-label") == "Prompt of region 1"
    assert abs(top - (500 - one(seen, ".mos-stage").size["height"]) / 2) < 5


def test_the_keyboard_alone_draws(seen: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> None:
        ActionChains(seen).send_keys(*keys).perform()

    tab_to(seen, lambda at: at.text == "Add a region")
    press(Keys.ENTER)
    assert boxes(seen) == [[25, 25, 75, 95]]
    press(*[Keys.ARROW_LEFT] * 5, Keys.ARROW_UP)
    assert boxes(seen) == [[20, 24, 70, 94]]
    ActionChains(seen).key_down(Keys.SHIFT).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_UP).key_up(Keys.SHIFT).perform()
    assert boxes(seen) == [[20, 24, 71, 93]]
    tab_to(seen, lambda at: at.get_attribute("aria-label") == "Prompt of region 1")
    press("a brown dog")
    tab_to(seen, lambda at: at.get_attribute("aria-label") == "Left of region 1")
    press(Keys.ARROW_UP)
    assert boxes(seen)[0][0] == 21
    tab_to(seen, lambda at: (at.get_attribute("placeholder") or "").startswith("a dog and a vase"))
    press("a dog in the snow")
    tab_to(seen, lambda at: at.get_attribute("id") == "draw")
    press(Keys.ENTER)
    until(seen, lambda: seen.find_elements("css selector", "#picture img"))
    tab_to(seen, lambda at: (at.get_attribute("class") or "").startswith("mos-box"))
    press(Keys.DELETE)
    assert boxes(seen) == []


def test_the_layout_that_is_saved_is_the_one_on_the_canvas(seen: Any, tmp_path: Path) -> None:
    seen.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    saved = tmp_path / "layout.json"
    assert one(seen, "#png").get_attribute("disabled") is not None
    one(seen, "#save-layout").click()  # before there is a picture
    until(seen, saved.exists)
    assert json.loads(saved.read_text())["regions"] == []
    saved.unlink()
    drag(seen, (0.1, 0.1), (0.6, 0.6))
    write(seen, "Prompt of region 1", "a red vase")
    set_number(seen, "Steps", "2")
    draw(seen, "a meadow")
    until(seen, lambda: one(seen, "#png").get_attribute("disabled") is None)
    write(seen, "Prompt of region 1", "a brown dog")
    one(seen, "#save-layout").click()
    until(seen, saved.exists)
    told = json.loads(saved.read_text())
    assert (told["prompt"], [region["prompt"] for region in told["regions"]]) == ("a meadow", ["a brown dog"])


def tab_to(driver: Any, there: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    for _ in range(120):
        if there(driver.switch_to.active_element):
            return
        ActionChains(driver).send_keys(Keys.TAB).perform()
    raise AssertionError("no key leads there")


def test_a_dropped_concept_is_offered_and_the_drawing_stays(seen: Any, packs: dict[str, Path]) -> None:
    drag(seen, (0.1, 0.1), (0.6, 0.6))
    drawn = boxes(seen)
    one(seen, "input[type='file'][multiple]").send_keys(str(packs["rex"]))
    until(seen, lambda: seen.find_elements("css selector", "[data-concept='<rex>']"))
    assert boxes(seen) == drawn
    field = one(seen, "[aria-label='Prompt of region 1']")
    for begun in ("", "a <r"):
        write(seen, "Prompt of region 1", begun)
        one(seen, "[data-concept='<rex>']").click()
        assert field.get_property("value") == "a <rex>"
    write(seen, "Prompt of region 1", "meadow")
    one(seen, "[data-concept='<rex>']").click()
    assert field.get_property("value") == "meadow <rex>"


def test_after_a_file_is_refused_the_next_one_is_loaded(seen: Any, packs: dict[str, Path], tmp_path: Path) -> None:
    refused = tmp_path / "bad.safetensors"
    refused.write_bytes(b"not a file")
    one(seen, "input[type='file'][multiple]").send_keys(str(refused))
    until(seen, lambda: "bad.safetensors" in "".join(told(seen)))
    assert "".join(told(seen)).count("bad.safetensors") == 1
    until(seen, lambda: not seen.find_elements("css selector", ".file-preview"))
    time.sleep(0.5)  # Gradio marks its part of the page a moment later than it tells the error
    assert seen.execute_script(
        """const zone = document.querySelector("input[type='file'][multiple]").closest(".zone");
        zone.scrollIntoView({block: "center"});
        const {x, y, width, height} = zone.getBoundingClientRect();
        return document.elementFromPoint(x + width / 2, y + height / 2).closest(".wrap").innerText"""
    ).startswith("Drop File Here")
    one(seen, "input[type='file'][multiple]").send_keys(str(packs["rex"]))
    drag(seen, (0.1, 0.1), (0.6, 0.6))
    until(seen, lambda: seen.find_elements("css selector", "[data-concept='<rex>']"))
    assert "bad.safetensors" not in "".join(told(seen))


def open_tab(driver: Any, label: str) -> None:
    (tab,) = [each for each in driver.find_elements("css selector", "[role='tab']") if each.text == label]
    tab.click()


def shown(driver: Any, selector: str) -> list[Any]:
    return [each for each in driver.find_elements("css selector", selector) if each.is_displayed()]


def test_the_fused_pack_is_drawn_with_by_one_button(seen: Any, packs: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    open_tab(seen, "Fuse")
    until(seen, lambda: shown(seen, "[aria-label='Method']"))
    for path in packs.values():
        inputs = "//*[@role='tabpanel'][.//button[normalize-space()='Fuse']]//input[@type='file'][@multiple]"
        seen.find_element("xpath", inputs).send_keys(str(path))
        time.sleep(1)
    (method,) = shown(seen, "[aria-label='Method']")
    method.send_keys(Keys.CONTROL, "a")
    method.send_keys("sum", Keys.ENTER)
    assert not shown(seen, "#draw-with-it")
    (fuse,) = shown(seen, "button.primary")
    fuse.click()
    (button,) = until(seen, lambda: shown(seen, "#draw-with-it"))
    seen.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    until(seen, lambda: shown(seen, "#draw") and "rex, tom" in one(seen, "body").text)


def test_one_file_after_the_other_is_looked_into(seen: Any, packs: dict[str, Path]) -> None:
    open_tab(seen, "Look into a file")
    for name in packs:
        (zone,) = until(seen, lambda: shown(seen, ".zone"))
        zone.find_element("css selector", "input[type='file']").send_keys(str(packs[name]))
        until(seen, lambda name=name: f"<{name}>" in one(seen, "body").text)
        until(seen, lambda: not seen.find_elements("css selector", ".file-preview"))


def test_no_word_of_a_card_is_broken(seen: Any, packs: dict[str, Path]) -> None:
    open_tab(seen, "Look into a file")
    (zone,) = until(seen, lambda: shown(seen, ".zone"))
    zone.find_element("css selector", "input[type='file']").send_keys(str(packs["rex"]))
    until(seen, lambda: seen.find_elements("css selector", "#card td"))
    broken = seen.execute_script(
        """const broken = [], range = document.createRange();
        const texts = document.createTreeWalker(document.querySelector("#card"), NodeFilter.SHOW_TEXT);
        for (let text = texts.nextNode(); text; text = texts.nextNode()) {
          if (!text.parentElement.closest("td, th")) continue;
          for (const word of text.data.matchAll(/\\w+/g)) {
            range.setStart(text, word.index);
            range.setEnd(text, word.index + word[0].length);
            if (range.getClientRects().length > 1) broken.push(word[0]);
          }
        }
        return broken"""
    )
    assert broken == []
    assert seen.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def told(driver: Any) -> list[str]:
    """The messages that the page shows."""
    return [each.text for each in driver.find_elements("css selector", ".toast-body")]


def test_a_painted_mask_is_what_is_sent(seen: Any) -> None:
    one(seen, "[data-tool='paint']").click()
    drag(seen, (0.3, 0.5), (0.7, 0.5))
    mask = seen.execute_script("return document.querySelector('.mos-mask').toDataURL()")
    assert mask.startswith("data:image/png")
    write(seen, "Prompt of region 1", "a brown dog")
    set_number(seen, "Steps", "2")
    draw(seen, "a meadow")
    assert problems(seen) == []


def test_a_fast_stroke_is_painted_without_gaps(seen: Any) -> None:
    one(seen, "[data-tool='paint']").click()
    drag(seen, (0.05, 0.5), (0.95, 0.5))
    gaps = """const mask = document.querySelector('.mos-mask'), middle = Math.round(mask.height / 2);
        const from = Math.round(0.1 * mask.width), length = Math.round(0.8 * mask.width);
        return [...mask.getContext('2d').getImageData(from, middle, length, 1).data].filter((_, at) => at % 4 === 3)"""
    assert min(seen.execute_script(gaps)) == 255


def test_regions_added_by_the_button_lie_beside_each_other(seen: Any) -> None:
    for _ in range(3):
        seen.execute_script("document.querySelector('[data-act=add]').click()")
    added = boxes(seen)
    for at, (left, top, right, bottom) in enumerate(added):
        for other in added[:at]:
            assert min(right, other[2]) <= max(left, other[0]) or min(bottom, other[3]) <= max(top, other[1])


def test_nothing_is_asked_of_other_machines(seen: Any, server: str) -> None:
    asked = [json.loads(entry["message"])["message"] for entry in seen.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    assert urls
    assert [url for url in urls if not url.startswith((server, "data:", "blob:", "about:", "chrome"))] == []


def test_it_fits_the_window(seen: Any) -> None:
    assert seen.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def problems(driver: Any) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
