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


def draw_regions(
    regions: Sequence[Region],
    image: Image.Image,
    *,
    colours: Sequence[str] = COLOURS,
    labels: Sequence[str] | None = None,
    label_size: float | None = None,
) -> Image.Image:
    """Draw every region over a copy of a picture: a tint, an outline, and its prompt.

    Args:
        regions: The regions; a soft edge is drawn soft.
        image: The picture below.
        colours: Colours of the regions in their order, used again from the start if there are more regions.
        labels: Texts to write into the regions, in place of their prompts.
        label_size: Height of the texts, in pixels; by default Pillow's.

    Returns:
        An RGB picture of the same size.
    """
    picture = read_image(image, called="the picture").convert("RGBA")
    for number, region in enumerate(regions):
        share = coverage(region, picture.height, picture.width).numpy()
        tint = Image.new("RGBA", picture.size, colours[number % len(colours)])
        inside = Image.fromarray((share >= 0.5).astype(np.uint8) * 255)
        edge = np.asarray(inside) - np.asarray(inside.filter(ImageFilter.MinFilter(3)))
        edge |= _find_border(np.asarray(inside))
        alpha = np.maximum((share * _OPACITY).astype(np.uint8), edge)
        tint.putalpha(Image.fromarray(alpha))
        picture = Image.alpha_composite(picture, tint)
    _write_labels(
        regions, picture, colours, [region.prompt for region in regions] if labels is None else labels, label_size
    )
    return picture.convert("RGB")


def _find_border(inside: np.ndarray) -> np.ndarray:
    """The region's pixels on the picture's border, which `MinFilter` leaves out; 0 and 255."""
    border = np.zeros_like(inside)
    for line in (np.s_[0, :], np.s_[-1, :], np.s_[:, 0], np.s_[:, -1]):
        border[line] = inside[line]
    return border


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
