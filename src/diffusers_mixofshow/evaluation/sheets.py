"""Pictures of what was measured, in labelled rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw


_GAP = 4
_LETTER = 7
"""Width that is kept for a letter of a label, in pixels."""


def labelled_rows(rows: Mapping[str, Sequence[Image.Image]], side: int = 128) -> Image.Image:
    """Arrange pictures in rows on white, each row with its label to the left.

    Args:
        rows: Label to pictures, at least one.
        side: Longest side of a picture on the sheet, in pixels.
    """
    margin = 2 * _GAP + _LETTER * max(len(label) for label in rows)
    columns = max(len(pictures) for pictures in rows.values())
    canvas = Image.new("RGB", (margin + columns * (side + _GAP), _GAP + len(rows) * (side + _GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for line, (label, pictures) in enumerate(rows.items()):
        top = _GAP + line * (side + _GAP)
        draw.text((_GAP, top + side // 2), label.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for column, picture in enumerate(pictures):
            scale = side / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            canvas.paste(picture.resize(size, Image.Resampling.LANCZOS), (margin + column * (side + _GAP), top))
    return canvas
