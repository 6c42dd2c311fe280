"""A picture of what a fusion keeps: a cell for each layer and concept, with a legend and names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw


TITLE = "What the fusion lost of each row's outputs, layer by layer (the residual of its features)"
UNCHANGED = (200, 200, 200)
"""Colour of a layer that a LoRA does not change."""
LINES = (225, 225, 225)
"""Colour between the cells."""

MARGIN, TOP = 12, 76
"""Empty pixels around everything; height of the title, the legend and the labels of groups, with the margin."""
CELL, NARROW = 24, 14
"""Side of a cell with the line to the next, in pixels; width where there are more layers than `FEW`."""
FEW = 60
_LINE = 20


@dataclass(frozen=True)
class Column:
    """A layer.

    Args:
        name: Its name.
        group: Label of its kind; columns of one group stand together.
        values: Residual for each row; None where the row's LoRA does not change the layer.
    """

    name: str
    group: str
    values: Sequence[float | None]


def draw_heat_map(rows: Sequence[str], columns: Sequence[Column]) -> Image.Image:
    """Draw the cells with a legend, labels of groups above and names of layers below.

    Args:
        rows: Names of concepts and plain LoRAs.
        columns: The layers; those of one group one after another.
    """
    width, left = cell_width(len(columns)), find_left(rows)
    places = place_columns(columns, left)
    bottom = TOP + CELL * len(rows)
    labels = [_write_upwards(column.name) for column in columns]
    least = max(_measure(TITLE), sum(_measure(text) + 2 * _LINE for text, _ in _LEGEND)) + MARGIN
    starts = {column.group: place for place, column in reversed([*zip(places, columns, strict=True)])}
    size = (
        max(least, max(places) + width, *(start + _measure(group) for group, start in starts.items())) + MARGIN,
        bottom + max(label.height for label in labels) + 2 * MARGIN,
    )
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    _draw_legend(pen)
    for row, name in enumerate(rows):
        pen.text((MARGIN, TOP + CELL * row + CELL // 4), name, fill="black")
    for place, column, label in zip(places, columns, labels, strict=True):
        for row, value in enumerate(column.values):
            _draw_cell(pen, place, TOP + CELL * row, width, _colour(value))
        picture.paste(label, (place + (width - label.width) // 2, bottom + 4))
    for group, start in starts.items():
        pen.text((start, TOP - _LINE), group, fill="black")
    return picture


def cell_width(columns: int) -> int:
    """Width of a cell with the line to the next."""
    return CELL if columns <= FEW else NARROW


def find_left(rows: Sequence[str]) -> int:
    """Where the cells begin, right of the rows' names."""
    return MARGIN + max(map(_measure, rows)) + MARGIN


def place_columns(columns: Sequence[Column], left: int) -> list[int]:
    """Left edge of each column: a gap, or as much as the label before needs, is between two groups."""
    places: list[int] = []
    place = least = left
    width, before = cell_width(len(columns)), ""
    for column in columns:
        if column.group != before:
            place = max(place + (MARGIN if places else 0), least)
            least, before = place + _measure(column.group) + MARGIN, column.group
        places.append(place)
        place += width
    return places


_LEGEND: Sequence[tuple[str, float | None]] = (
    ("0: as with its own LoRA", 0.0),
    ("0.5", 0.5),
    ("1 or more: lost, no better than the base", 1.0),
    ("its LoRA does not change this layer", None),
)


def _draw_legend(pen: ImageDraw.ImageDraw) -> None:
    pen.text((MARGIN, MARGIN - 4), TITLE, fill="black")
    place, top = MARGIN, MARGIN + _LINE - 4
    for text, value in _LEGEND:
        _draw_cell(pen, place, top, _LINE - 4, _colour(value), height=_LINE - 4)
        pen.text((place + _LINE, top + 2), text, fill="black")
        place += _measure(text) + 2 * _LINE


def _draw_cell(
    pen: ImageDraw.ImageDraw, left: int, top: int, width: int, colour: tuple[int, int, int], height: int = CELL
) -> None:
    """A cell with a line around it, which the next cells share."""
    pen.rectangle((left - 1, top - 1, left + width - 1, top + height - 1), fill=colour, outline=LINES)


def _colour(value: float | None) -> tuple[int, int, int]:
    """White at 0, red at 1 and above."""
    if value is None:
        return UNCHANGED
    fade = round(255 * (1 - min(1.0, value)))
    return (255, fade, fade)


def _measure(text: str) -> int:
    """Width of a text in pixels."""
    return int(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(text)) + 1


def _write_upwards(text: str) -> Image.Image:
    """A text that reads from below."""
    written = Image.new("RGB", (_measure(text), 12), "white")
    ImageDraw.Draw(written).text((0, 0), text, fill="black")
    return written.rotate(90, expand=True)
