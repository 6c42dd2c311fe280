"""Sheets of pictures with labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffusers_mixofshow.atomic import write_picture
from diffusers_mixofshow.sheets import draw_labelled_sheet


def picture(colour: str, width: int = 8) -> Image.Image:
    return Image.new("RGB", (width, 8), colour)


def coloured(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[slice, slice]:
    """Where a colour is: the rows and columns of its box."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(axis=2))
    return slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1)


def test_pictures_stand_in_rows_and_columns_twice_as_large() -> None:
    sheet = draw_labelled_sheet({"a": [picture("red")], "b": [picture("lime"), picture("blue", width=12)]}, scale=2)
    red, lime, blue = (coloured(sheet, colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    assert red[1] == lime[1]
    assert red[0].stop < lime[0].start == blue[0].start
    assert blue[1].stop - blue[1].start == 24
    assert blue[1].start > lime[1].stop


def test_every_row_has_its_label_in_front_and_the_title_above() -> None:
    rows = {"regions": [picture("red")], "plain prompt\nwith two lines": [picture("lime")]}
    sheet = draw_labelled_sheet(rows, title="what it is")
    red, lime = (coloured(sheet, colour) for colour in ((255, 0, 0), (0, 255, 0)))
    dark = np.asarray(sheet.convert("L")) < 100
    start = red[1].start
    assert dark[: red[0].start].any()
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    assert int(dark.any(axis=1).argmax()) == pytest.approx(pen.textbbox((4, 2), "what it is")[1], abs=2)
    assert dark[red[0].start : lime[0].start, :start].any()
    assert dark[lime[0].stop :, :start].any() or dark[lime[0], :start].any()
    assert not dark[red[0].start :, start + 8 :].any()


def test_a_written_sheet_is_a_png(tmp_path: Path) -> None:
    sheet = draw_labelled_sheet({"a": [picture("red")]})
    write_picture(tmp_path / "made" / "sheet.png", sheet)
    with Image.open(tmp_path / "made" / "sheet.png") as read:
        assert read.format == "PNG"
        assert read.tobytes() == sheet.tobytes()


@pytest.mark.parametrize(("title", "top"), [(None, 4), ("what it is", 20)])
@pytest.mark.parametrize("scale", [1, 3])
def test_every_picture_stands_where_rows_and_columns_meet(title: str | None, top: int, scale: int) -> None:
    """Four pixels are left between pictures, and before and behind the longest label."""
    rows = {
        "a": [Image.new("RGB", (30, 20), "red"), Image.new("RGB", (10, 40), "lime")],
        "longer": [Image.new("RGB", (20, 40), "blue"), Image.new("RGB", (16, 10), "cyan")],
        "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\nten": [Image.new("RGB", (5, 5), "magenta")],
    }
    sheet = draw_labelled_sheet(rows, title=title, scale=scale)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [pen.multiline_textbbox((0, 0), label) for label in rows]
    left, tall = 8 + int(max(box[2] for box in boxes)), int(boxes[2][3])
    second, third = top + 40 * scale + 4, top + 80 * scale + 8
    expected = {
        (255, 0, 0): (left, top, 30 * scale, 20 * scale),
        (0, 255, 0): (left + 30 * scale + 4, top, 10 * scale, 40 * scale),
        (0, 0, 255): (left, second, 20 * scale, 40 * scale),
        (0, 255, 255): (left + 30 * scale + 4, second, 16 * scale, 10 * scale),
        (255, 0, 255): (left, third, 5 * scale, 5 * scale),
    }
    for colour, (x, y, width, height) in expected.items():
        assert coloured(sheet, colour) == (slice(y, y + height), slice(x, x + width))
    assert sheet.size == (left + 46 * scale + 8, third + max(tall, 5 * scale) + 4)
    dark = np.asarray(sheet.convert("L"))[:, : left - 4] < 100
    for (x, y, _, _), height, box in zip(
        [expected[255, 0, 0], expected[0, 0, 255], expected[255, 0, 255]],
        (40 * scale, 40 * scale, max(tall, 5 * scale)), boxes, strict=True,
    ):  # fmt: skip
        lines = np.nonzero(dark[y : y + height].any(axis=1))[0]
        middle = (height - int(box[3])) // 2
        assert lines.min() == pytest.approx(middle + box[1], abs=1)
        assert lines.max() == pytest.approx(middle + box[3] - 1, abs=1)
        assert np.nonzero(dark[y : y + height].any(axis=0))[0].min() == pytest.approx(4, abs=1)
        assert x > 0
    assert (np.asarray(sheet)[:4, -4:] == 255).all()
    if title is not None:
        assert np.nonzero(dark[:20].any(axis=1))[0].min() >= 2


def test_without_a_scale_pictures_keep_their_size() -> None:
    sheet = draw_labelled_sheet({"a": [picture("red", width=12)]})
    rows, columns = coloured(sheet, (255, 0, 0))
    assert (rows.stop - rows.start, columns.stop - columns.start) == (8, 12)
