"""Sheets of pictures with labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_mixofshow.atomic import write_picture
from diffusers_mixofshow.sheets import labelled_sheet


def picture(colour: str, width: int = 8) -> Image.Image:
    return Image.new("RGB", (width, 8), colour)


def coloured(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[slice, slice]:
    """Where a colour is: the rows and columns of its box."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(axis=2))
    return slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1)


def test_pictures_stand_in_rows_and_columns_twice_as_large() -> None:
    sheet = labelled_sheet({"a": [picture("red")], "b": [picture("lime"), picture("blue", width=12)]}, scale=2)
    red, lime, blue = (coloured(sheet, colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    assert red[1] == lime[1]
    assert red[0].stop < lime[0].start == blue[0].start
    assert blue[1].stop - blue[1].start == 24
    assert blue[1].start > lime[1].stop


def test_every_row_has_its_label_in_front_and_the_title_above() -> None:
    rows = {"regions": [picture("red")], "plain prompt\nwith two lines": [picture("lime")]}
    sheet = labelled_sheet(rows, title="what it is")
    red, lime = (coloured(sheet, colour) for colour in ((255, 0, 0), (0, 255, 0)))
    dark = np.asarray(sheet.convert("L")) < 100
    start = red[1].start
    assert dark[: red[0].start].any()
    assert dark[red[0].start : lime[0].start, :start].any()
    assert dark[lime[0].stop :, :start].any() or dark[lime[0], :start].any()
    assert not dark[red[0].start :, start + 8 :].any()


def test_a_written_sheet_is_a_png(tmp_path: Path) -> None:
    sheet = labelled_sheet({"a": [picture("red")]})
    write_picture(tmp_path / "made" / "sheet.png", sheet)
    with Image.open(tmp_path / "made" / "sheet.png") as read:
        assert read.format == "PNG"
        assert read.tobytes() == sheet.tobytes()
