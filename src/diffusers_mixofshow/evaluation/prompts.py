"""Prompts for measuring on Toyland: those that fusion records, those it never sees, and those of several concepts."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers_mixofshow.regions import Region


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
"""For `GradientFuser` on the embedded base: every background once or twice."""

HELD_OUT_PROMPTS = (
    "a photo of a <TOK> in the meadow",
    "a <TOK> at the beach",
    "there is a <TOK> in the desert",
    "a picture of a <TOK> in snow",
    "a photo of a <TOK> in the night",
    "a <TOK>, in the room",
)
"""For measuring: the same backgrounds in wordings that are not among the recorded ones."""

_SKY, _GROUND = 0.25, 0.97
"""Top and bottom of the regions."""

TOGETHER_PLACES = ("in a meadow", "on the beach", "in the desert", "in the snow", "at night", "in a room")


def prompt_together(names: Sequence[str], place: str) -> str:
    """One prompt that names every concept, from left to right.

    Args:
        names: Concept names.
        place: For example "on the beach".
    """
    subjects = [f"a <{name}>" for name in names]
    return f"{', '.join(subjects[:-1])} and {subjects[-1]} {place}"


def column_boxes(count: int) -> list[tuple[float, float, float, float]]:
    """Equal columns from left to right, as high as things stand in Toyland; the sky above is the global prompt's."""
    return [(index / count, _SKY, (index + 1) / count, _GROUND) for index in range(count)]


def regions_of(names: Sequence[str], boxes: Sequence[tuple[float, float, float, float]]) -> list[Region]:
    """One region a concept; the place is the global prompt's to say."""
    return [Region(f"a <{name}>", box=box) for name, box in zip(names, boxes, strict=True)]
