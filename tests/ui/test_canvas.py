"""The canvas' value is read as any stranger's file, and shows what layouts say."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffusers_mixofshow.ui
from diffusers_mixofshow import Layout, Region
from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.ui.canvas import make_empty, read_colours, read_names, to_layout, to_value


FILES = Path(diffusers_mixofshow.ui.__file__).parent


def png(size: tuple[int, int] = (8, 8)) -> str:
    image = Image.new("RGB", size, "black")
    image.paste("white", (0, 0, size[0] // 2, size[1]))
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def canvas_of(*regions: dict, **changes: object) -> dict:
    return make_empty(64, 96) | {"regions": list(regions)} | changes


BOX = {"name": "left", "colour": "#123456", "prompt": "a dog", "box": [0, 0, 0.5, 1]}


def test_what_was_drawn_becomes_a_layout() -> None:
    layout = to_layout(canvas_of(BOX, {"prompt": "a cat", "mask": png(), "negative_prompt": ""}), "two pets", "")
    assert (layout.prompt, layout.negative_prompt, layout.width, layout.height) == ("two pets", None, 64, 96)
    first, second = layout.regions
    assert (first.prompt, first.box) == ("a dog", (0, 0, 0.5, 1))
    assert (second.prompt, second.box, second.negative_prompt) == ("a cat", None, None)
    assert np.asarray(second.mask)[:, :4].all()
    assert not np.asarray(second.mask)[:, 4:].any()


def test_a_layout_comes_back_from_the_canvas_with_all_it_says() -> None:
    mask = np.zeros((6, 6), bool)
    mask[:3] = True
    regions = [Region("a", box=(0, 0, 1, 0.5), weight=2.0, order=1, feather=0.1), Region("b", mask=mask, end=0.5)]
    layout = Layout(tuple(regions), "p", "n", 72, 80)
    value = json.loads(json.dumps(to_value(layout, 8, 8)))
    assert to_layout(value, "p", "n").describe() == layout.describe()
    assert len({entry["colour"] for entry in value["regions"]}) == 2


def test_names_of_regions_are_saved_and_come_back(tmp_path: Path) -> None:
    value = canvas_of(BOX, {"name": "", "prompt": "a cat", "mask": png()})
    file = to_layout(value, "two pets", "").save(tmp_path / "layout.json")
    assert [region.get("name") for region in json.loads(file.read_text())["regions"]] == ["left", None]
    again = to_value(Layout.load(file), 8, 8)
    assert [region["name"] for region in again["regions"]] == ["left", ""]
    assert read_names(again) == ["left", "Region 2"]


def test_a_layout_without_a_size_has_the_one_of_the_page() -> None:
    value = to_value(Layout((Region("a", box=(0, 0, 1, 1)),)), 40, 48)
    assert (value["width"], value["height"]) == (40, 48)


def test_every_canvas_that_python_sends_is_told_from_the_one_before() -> None:
    assert make_empty(8, 8)["revision"] != make_empty(8, 8)["revision"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "no regions as the page writes"),
        ("<b>", "no regions as the page writes"),
        ([], "no regions as the page writes"),
        ({"width": 64, "height": 64}, "no regions as the page writes"),
        (canvas_of(regions="x"), "no regions as the page writes"),
        (canvas_of(regions=["x"]), "no regions as the page writes"),
        (canvas_of(*[BOX] * 25), "25 regions; expected at most 24"),
        (canvas_of(BOX | {"prompt": "x" * 5_000_000}), "of 4 MB in all"),
        (canvas_of(BOX | {"prompt": "  "}), "region 1 ('left') has no prompt"),
        (canvas_of({"box": [0, 0, 1, 1]}), "region 1 has no prompt"),
        (canvas_of(BOX | {"prompt": ""}), "region 1 ('left') has no prompt; write what it shows."),
        (canvas_of({"name": "", "box": [0, 0, 1, 1]}), "region 1 has no prompt; write what it shows."),
        (canvas_of(BOX | {"prompt": 3}), "its prompt is a int"),
        (canvas_of(BOX | {"name": ["left"]}), "its name is a list"),
        (canvas_of(BOX | {"box": [0, 0, 2, 1]}), "leaves"),
        (canvas_of(BOX | {"box": "all"}), "its box"),
        (canvas_of(BOX | {"box": None}), "either a box or a mask"),
        (canvas_of(BOX | {"mask": png()}), "either a box or a mask"),
        (canvas_of(BOX | {"__class__": 1}), "__class__"),
        (canvas_of({"prompt": "a", "mask": "secret.png"}), "mask that is no PNG of its own"),
        (canvas_of({"prompt": "a", "mask": "/etc/passwd"}), "mask that is no PNG of its own"),
        (canvas_of({"prompt": "a", "mask": ["x"]}), "mask that is no PNG of its own"),
        (canvas_of({"prompt": "a", "mask": "data:image/png;base64,AAAA"}), "cannot be read"),
        (canvas_of({"prompt": "a", "mask": "data:image/png;base64,!"}), "no base64"),
        (canvas_of(BOX, width=60), "width of 60 pixels"),
        (canvas_of(BOX, width=0), "width of 0 pixels"),
        (canvas_of(BOX, width=1e400), "width of inf pixels"),
        (canvas_of(BOX, width=10**400), f"width of {10**400} pixels"),
        (canvas_of(BOX, height=4096), "height of 4096 pixels"),
        (canvas_of(BOX, height="64"), "height of '64' pixels"),
        (canvas_of(BOX, height=None), "height of None pixels"),
        (canvas_of(BOX, height=64.5), "height of 64.5 pixels"),
    ],
)
def test_what_is_no_canvas_is_refused(value: object, message: str) -> None:
    with pytest.raises(RegionError, match=re.escape(message)):
        to_layout(value, "p", "")


def test_colours_and_names_are_taken_only_where_they_are_some() -> None:
    value = canvas_of(BOX, {"colour": "red;}"}, {"name": "x" * 99})
    assert read_colours(value)[0] == "#123456"
    assert re.fullmatch("#[0-9a-f]{6}", read_colours(value)[1])
    assert read_names(value) == ["left", "Region 2", "x" * 40]


@pytest.mark.parametrize("name", ["canvas.html", "canvas.css", "canvas.js"])
def test_the_canvas_needs_nothing_from_elsewhere(name: str) -> None:
    text = (FILES / name).read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bimport\(|fetch\(|innerHTML|\beval\b", text)


def test_what_a_stranger_wrote_is_not_rendered_as_a_template() -> None:
    rendered = re.findall(r"\$\{(.*?)\}|\{\{(.*?)\}\}", (FILES / "canvas.html").read_text())
    assert rendered == [("revision", ""), ("value.revision", "")]
    assert "${" not in (FILES / "canvas.css").read_text()
