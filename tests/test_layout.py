"""Layouts: pixels, JSON files, pictures."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.regions import Layout, Region, region_weights


MASK = np.zeros((30, 40), dtype=np.uint8)
MASK[5:20, 10:30] = 255


@pytest.fixture
def layout():
    regions = (
        Region("a <potter>, ünïcode", box=(0, 0, 0.5, 1), negative_prompt="beard", weight=2, feather=0.1, order=1),
        Region("a dog", mask=MASK, guidance_scale=5.5, start=0.1, end=0.8, control_scale=0.3),
        Region("a cat", box=(0.1, 0.2, 0.3, 0.4), rounding="inward"),
    )
    return Layout(regions, prompt="two", negative_prompt="bad", width=768, height=512)


def same(one, other):
    """Whether two regions say the same, whatever their mask is made of."""
    names = [field.name for field in dataclasses.fields(Region) if field.name != "mask"]
    plain = all(getattr(one, name) == getattr(other, name) for name in names)
    return plain and torch.equal(region_weights([one], 13, 17), region_weights([other], 13, 17))


def test_boxes_in_pixels():
    layout = (
        Layout(width=768, height=512).with_region("a", box=(192, 0, 768, 256), feather=0.1).with_region("b", mask=MASK)
    )
    assert layout.regions[0].box == (0.25, 0, 1, 0.5)
    assert layout.regions[0].feather == 0.1
    assert [region.prompt for region in layout] == ["a", "b"]
    assert len(layout) == 2
    with pytest.raises(RegionError, match="width"):
        Layout().with_region("a", box=(0, 0, 100, 100))
    with pytest.raises(RegionError, match="leaves"):
        layout.with_region("a", box=(0, 0, 800, 100))


def test_arguments_are_those_of_a_pipeline(layout):
    arguments = layout.arguments()
    assert arguments.pop("regions") == list(layout)
    assert arguments == {"prompt": "two", "negative_prompt": "bad", "width": 768, "height": 512}
    assert Layout().arguments() == {"regions": []}


def test_saved_and_loaded_it_says_the_same(layout, tmp_path):
    path = layout.save(tmp_path / "new" / "layout.json")
    again = Layout.load(path)
    assert all(same(one, other) for one, other in zip(layout, again, strict=True))
    names = ("prompt", "negative_prompt", "width", "height")
    assert all(getattr(again, name) == getattr(layout, name) for name in names)
    assert [entry.name for entry in path.parent.iterdir()] == ["layout.json"]
    assert json.loads(path.read_text())["regions"][2] == {
        "prompt": "a cat", "box": [0.1, 0.2, 0.3, 0.4], "rounding": "inward",
    }  # fmt: skip


def test_a_mask_may_be_a_picture_beside_the_file(tmp_path):
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    content = {"format": "mixofshow-layout", "version": 1, "regions": [{"prompt": "a", "mask": "mask.png"}]}
    (tmp_path / "layout.json").write_text(json.dumps(content))
    (region,) = Layout.load(tmp_path / "layout.json")
    assert same(region, Region("a", mask=MASK))


def test_every_defect_of_a_file_is_named_at_once(tmp_path):
    content = {
        "format": "mixofshow-layout",
        "version": 1,
        "width": -3,
        "colour": "red",
        "regions": [
            {"prompt": "a", "box": [0, 0, 2, 1]},
            {"box": [0, 0, 1, 1], "wieght": 2},
            7,
            {"prompt": "b", "mask": "missing.png"},
            {"prompt": "c", "mask": "data:image/png;base64,%%%"},
        ],
    }
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RegionError) as error:
        Layout.load(path)
    expected = ["colour", "width is -3", "leaves [0, 1]", "wieght", "region 1 has no prompt", "region 2 is no object"]
    assert all(word in str(error.value) for word in [str(path), *expected, "missing.png", "no base64"])
    sound = Layout([Region("a", mask=MASK)]).describe()
    sound["regions"][0]["mask"] = sound["regions"][0]["mask"][:60] + "!" + sound["regions"][0]["mask"][60:]
    with pytest.raises(RegionError, match="the mask of region 0 cannot be read: no base64"):
        Layout.from_description(sound, path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "mixofshow-layout", "version": 2}'])
def test_other_files_are_no_layouts(tmp_path, text):
    path = tmp_path / "layout.json"
    path.write_text(text)
    with pytest.raises(RegionError, match="layout"):
        Layout.load(path)
    with pytest.raises(RegionError, match="cannot be read"):
        Layout.load(tmp_path / "none.json")


def test_defects_of_a_layout():
    with pytest.raises(RegionError) as error:
        Layout([{"prompt": "a"}], prompt=3, width=0.5)
    assert all(word in str(error.value) for word in ["region 0 is a dict", "prompt is a int", "width is 0.5"])


def test_it_is_drawn_alone_and_over_a_picture(layout):
    assert layout.draw().size == (768, 512)
    below = Image.new("RGB", (64, 48), "black")
    drawn = layout.draw(below)
    assert drawn.size == (64, 48)
    assert below.getextrema() == ((0, 0),) * 3
    pixels = np.asarray(drawn)
    assert pixels[30, 20].any()  # inside a region
    assert not pixels[2, 60].any()  # outside all
    assert np.asarray(Layout([Region("", mask=MASK)]).draw(below))[8, 16].max() > 150  # the outline
