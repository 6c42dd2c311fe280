"""Contact sheets: rows of pictures on white, each row with its label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw


_GAP = 4
_TITLE_HEIGHT = 16


def draw_labelled_sheet(
    rows: Mapping[str, Sequence[Image.Image]], *, title: str | None = None, scale: int = 1
) -> Image.Image:
    """Arrange pictures in rows, each with its label to the left.

    Args:
        rows: Label to the pictures of its row, from top to bottom; a label may have several lines, pictures any sizes.
        title: A line above everything.
        scale: How many times as large pictures are drawn.

    Returns:
        An RGB picture; columns are as wide as their widest picture.
    """
    pictures = [[_enlarge(picture, scale) for picture in row] for row in rows.values()]
    columns = max(len(row) for row in pictures)
    widths = [max(row[column].width for row in pictures if column < len(row)) for column in range(columns)]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [pen.multiline_textbbox((0, 0), label) for label in rows]
    heights = [max([box[3], *(picture.height for picture in row)]) for box, row in zip(boxes, pictures, strict=True)]
    top = _GAP if title is None else _TITLE_HEIGHT + _GAP
    left = 2 * _GAP + int(max(box[2] for box in boxes))
    size = (left + sum(width + _GAP for width in widths), top + sum(int(height) + _GAP for height in heights))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    if title is not None:
        pen.text((_GAP, _GAP // 2), title, fill="black")
    for label, box, row, height in zip(rows, boxes, pictures, heights, strict=True):
        pen.multiline_text((_GAP, top + (int(height) - int(box[3])) // 2), label, fill="black")
        for column, picture in enumerate(row):
            canvas.paste(picture, (left + sum(width + _GAP for width in widths[:column]), top))
        top += int(height) + _GAP
    return canvas


def _enlarge(picture: Image.Image, scale: int) -> Image.Image:
    size = (picture.width * scale, picture.height * scale)
    return picture if scale == 1 else picture.resize(size, Image.Resampling.LANCZOS)
