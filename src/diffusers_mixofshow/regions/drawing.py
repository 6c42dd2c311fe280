"""Draw regions over a picture, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from diffusers_mixofshow.pictures import read_image
from diffusers_mixofshow.regions.region import Region
from diffusers_mixofshow.regions.weights import coverage


COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
_OPACITY = 70
_LARGE = 256
"""A pixel more of an untinted region's outline, for so many of the picture's shorter side."""


def draw_regions(
    regions: Sequence[Region],
    image: Image.Image,
    *,
    colours: Sequence[str] = COLOURS,
    labels: Sequence[str] | None = None,
    label_size: float | None = None,
    tinted: bool = True,
) -> Image.Image:
    """Draw every region over a copy of a picture: a tint, an outline, and its prompt.

    Args:
        regions: The regions; a soft edge is drawn soft.
        image: The picture below.
        colours: Colours of the regions in their order, used again from the start if there are more regions.
        labels: Texts to write into the regions, in place of their prompts.
        label_size: Height of the texts, in pixels; by default Pillow's.
        tinted: Whether regions have a tint, which changes the picture's colours. Without it, the outline is wider on a
            large picture.

    Returns:
        An RGB picture of the same size.
    """
    picture = read_image(image, called="the picture").convert("RGBA")
    for number, region in enumerate(regions):
        share = coverage(region, picture.height, picture.width).numpy()
        tint = Image.new("RGBA", picture.size, colours[number % len(colours)])
        width = 1 if tinted else 1 + min(picture.size) // _LARGE
        edge = _find_outline((share >= 0.5).astype(np.uint8) * 255, width)
        alpha = np.maximum((share * _OPACITY * tinted).astype(np.uint8), edge)
        tint.putalpha(Image.fromarray(alpha))
        picture = Image.alpha_composite(picture, tint)
    _write_labels(
        regions, picture, colours, [region.prompt for region in regions] if labels is None else labels, label_size
    )
    return picture.convert("RGB")


def _find_outline(inside: np.ndarray, width: int) -> np.ndarray:
    """The outermost pixels of a region, of 0 and 255, so many deep; the picture's border counts as the region's."""
    padded = Image.fromarray(np.pad(inside, width))
    core = np.asarray(padded.filter(ImageFilter.MinFilter(2 * width + 1)))[width:-width, width:-width]
    return inside - core


def _write_labels(
    regions: Sequence[Region], picture: Image.Image, colours: Sequence[str], labels: Sequence[str], size: float | None
) -> None:
    pen = ImageDraw.Draw(picture)
    for number, (region, label) in enumerate(zip(regions, labels, strict=True)):
        rows, columns = np.nonzero(coverage(region, picture.height, picture.width).numpy() >= 0.5)
        if len(rows):
            corner = (int(columns.min()) + 4, int(rows.min()) + 4)
            pen.rectangle(pen.textbbox(corner, label, font_size=size), fill="white")
            pen.text(corner, label, fill=colours[number % len(colours)], font_size=size)
