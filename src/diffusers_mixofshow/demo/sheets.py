"""Pictures of pictures: the PNG sheets that the demo leaves beside its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image


_GAP = 4
_SCALE = 2


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Arrange pictures of one size in rows, twice as large, on white."""
    width, height = (_SCALE * side for side in rows[0][0].size)
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (columns * (width + _GAP) + _GAP, len(rows) * (height + _GAP) + _GAP), "white")
    for line, row in enumerate(rows):
        for column, picture in enumerate(row):
            place = (_GAP + column * (width + _GAP), _GAP + line * (height + _GAP))
            canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS), place)
    return canvas


def write_sheets(folder: Path, sheets: dict[str, Sequence[Sequence[Image.Image]]]) -> list[Path]:
    """Write every sheet as ``NAME.png`` and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in sheets.items():
        path = folder / f"{name}.png"
        sheet(rows).save(path)
        paths.append(path)
    return paths
