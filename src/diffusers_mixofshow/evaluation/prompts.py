"""Prompts for measuring: for Toyland, those that fusion records and others; for bases of photographs; for company."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers_mixofshow.base_models import embedded_base
from diffusers_mixofshow.families.stable_diffusion import EMBEDDED


RECORDING_PROMPTS = (
    "a <TOK> in a meadow",
    "a photo of a <TOK> on a beach",
    "a picture of a <TOK> in a desert",
    "a <TOK> in the snow",
    "a <TOK>, at night",
    "there is a <TOK> in a room",
    "a picture of a <TOK> on the beach",
    "a <TOK> on a meadow",
)
"""Prompts of `GradientFuser` on the embedded base: every background once or twice."""

HELD_OUT_PROMPTS = (
    "a photo of a <TOK> in the meadow",
    "a <TOK> at the beach",
    "there is a <TOK> in the desert",
    "a picture of a <TOK> in snow",
    "a photo of a <TOK> in the night",
    "a <TOK>, in the room",
)
"""Prompts for measuring: the backgrounds of `RECORDING_PROMPTS` in other wordings, some of them captions of photos."""

HELD_OUT_SCENE_PROMPTS = (
    "a dog in a <TOK>",
    "a photo of a vase in a <TOK>",
    "a picture of a critter in a <TOK>",
    "there is a chair in a <TOK>",
)
"""Prompts for measuring scenes, behind a thing; fusion records none of them."""

_STYLES = ("a watercolour painting of a <TOK>", "a <TOK> carved out of wood")

GENERAL_PROMPTS: dict[str, tuple[str, ...]] = {
    "character": (
        "a <TOK> on a beach at noon",
        "a <TOK> in front of a waterfall",
        *_STYLES,
        "a <TOK> reading a newspaper",
        "a <TOK> with a yellow hat",
    ),
    "pet": (
        "a <TOK> on a beach at noon",
        "a <TOK> in front of a waterfall",
        *_STYLES,
        "a <TOK> jumping over a puddle",
        "a <TOK> in a basket",
    ),
    "object": (
        "a <TOK> on a beach at noon",
        "a <TOK> in front of a waterfall",
        *_STYLES,
        "a cat beside a <TOK>",
        "a <TOK> covered with snow",
    ),
    "scene": (
        "a <TOK> in winter",
        "a <TOK> at night, full moon",
        *_STYLES,
        "a horse in a <TOK>",
        "a red balloon above a <TOK>",
    ),
}
"""Prompts for measuring on bases of photographs, by kind of concept: places, styles, actions and properties.

Fusion records none of them by default.
"""

TOGETHER_PLACES = ("in a meadow", "on the beach", "in the desert", "in the snow", "at night", "in a room")


def evaluation_prompts(base_model: str, kind: str) -> tuple[str, ...]:
    """Prompt templates for measuring a concept of a kind on a base model."""
    if embedded_base(base_model):
        return HELD_OUT_SCENE_PROMPTS if kind == "scene" else HELD_OUT_PROMPTS
    return GENERAL_PROMPTS[kind]


def name_with_class(name: str, class_word: str) -> str:
    """A concept's mention in a prompt of several concepts: with its class word, which says what stands there."""
    return f"a <{name}> {class_word}"


def prompt_together(subjects: Sequence[str], place: str) -> str:
    """Write one prompt that names every subject, from left to right.

    Args:
        subjects: Each with its article, such as from `name_with_class`.
        place: For example "on the beach".
    """
    *others, last = subjects
    return f"{', '.join(others)} and {last} {place}" if others else f"{last} {place}"


def column_boxes(count: int) -> list[tuple[float, float, float, float]]:
    """Boxes of equal columns from left to right, as high as things in Toyland; the sky is the global prompt's."""
    top, bottom = EMBEDDED.standing
    return [(index / count, top, (index + 1) / count, bottom) for index in range(count)]
