"""Layout conditions of bases that have one: Toyland's T2I-Adapter, which sees where things stand."""

from __future__ import annotations

import io
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusers_mixofshow import toyland
from diffusers_mixofshow.base_models import TOYLAND, embedded_base
from diffusers_mixofshow.regions.weights import coverage
from diffusers_mixofshow.sampling.control import IMAGE, Control
from diffusers_mixofshow.sampling.drawing import Given


if TYPE_CHECKING:
    from diffusers_mixofshow import Concept, Layout, Region

NAME = "layout.png"
"""What the condition image is called where a picture tells how it was drawn."""
SCALE = 0.8
"""Strength of the T2I-Adapter that Toyland's own measurements take."""
_USUAL = "critter"


def has_layout_condition(base: str) -> bool:
    """Whether a base follows where things stand."""
    return embedded_base(base) is not None


def layout_condition(layout: Layout, concepts: Sequence[Concept]) -> tuple[Control, Given]:
    """The model that follows the layout, and the picture that it follows.

    Args:
        layout: With a size.
        concepts: Whose class words tell what stands in a region.
    """
    from PIL import Image

    width, height = layout.width or 64, layout.height or 64
    boxes = [_box(region) for region in layout.regions]
    words = [_class_word(region.prompt, concepts) for region in layout.regions]
    image: Image.Image = toyland.draw_places(toyland.stand_in(boxes, words, width, height), width, height)
    content = io.BytesIO()
    image.save(content, "PNG")
    given = Given(path=Path(NAME), image=image.convert("RGB"), digest=sha256(content.getvalue()).hexdigest())
    return Control(IMAGE, TOYLAND, Path(NAME)), given


def _box(region: Region) -> tuple[float, float, float, float]:
    """The region's box, or the one around its mask."""
    if region.box is not None:
        return region.box
    inside = coverage(region, 64, 64).numpy() >= 0.5
    rows, columns = np.nonzero(inside)
    return columns.min() / 64, rows.min() / 64, (columns.max() + 1) / 64, (rows.max() + 1) / 64


def _class_word(prompt: str, concepts: Sequence[Concept]) -> str:
    """What stands in a region, as far as its prompt tells, in a word that Toyland knows."""
    known = list(toyland.world.WIDTH_OF_HEIGHT)
    meant = [concept.class_word for concept in concepts if concept.placeholder in prompt]
    words = [*meant, *prompt.lower().replace(",", " ").split()]
    return next((word for word in words if word in known), _USUAL)
