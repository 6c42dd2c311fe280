"""Layout conditions: condition images that show where things stand. Only Toyland has an adapter that follows them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusers_mixofshow import toyland
from diffusers_mixofshow.base_models import TOYLAND, canonical_name
from diffusers_mixofshow.regions.weights import coverage
from diffusers_mixofshow.sampling.control import IMAGE, Control
from diffusers_mixofshow.sampling.drawing import Given


if TYPE_CHECKING:
    from diffusers_mixofshow import Concept, Layout, Region

NAME = "layout.png"
"""Name of the condition image in the settings that a picture stores."""
SCALE = 0.8
"""Strength of the T2I-Adapter, as in Toyland's own measurements."""
_DEFAULT_WORD = "critter"


def has_layout_condition(base: str) -> bool:
    """Whether a base has an adapter that follows layout conditions."""
    return canonical_name(base) == TOYLAND


def draw_condition(layout: Layout, concepts: Sequence[Concept]) -> tuple[Control, Given]:
    """Draw the condition image of a layout, and name the adapter that follows it.

    Args:
        layout: A layout with a size.
        concepts: Concepts whose class words tell what stands in a region.
    """
    from PIL import Image

    width, height = layout.width or 64, layout.height or 64
    boxes = [_find_box(region) for region in layout.regions]
    words = [_choose_class_word(region.prompt, concepts) for region in layout.regions]
    image: Image.Image = toyland.draw_places(toyland.stand_in(boxes, words, width, height), width, height)
    content = io.BytesIO()
    image.save(content, "PNG")
    given = Given(path=Path(NAME), image=image.convert("RGB"), digest=sha256(content.getvalue()).hexdigest())
    return Control(IMAGE, TOYLAND, Path(NAME)), given


def _find_box(region: Region) -> tuple[float, float, float, float]:
    """The region's box, or the one around its mask."""
    if region.box is not None:
        return region.box
    inside = coverage(region, 64, 64).numpy() >= 0.5
    rows, columns = np.nonzero(inside)
    return columns.min() / 64, rows.min() / 64, (columns.max() + 1) / 64, (rows.max() + 1) / 64


def _choose_class_word(prompt: str, concepts: Sequence[Concept]) -> str:
    """The first word for a thing of Toyland, among the class words of the prompt's concepts and the prompt's words."""
    known = list(toyland.world.WIDTH_OF_HEIGHT)
    class_words = [concept.class_word for concept in concepts if concept.placeholder in prompt]
    words = [*class_words, *prompt.lower().replace(",", " ").split()]
    return next((word for word in words if word in known), _DEFAULT_WORD)
