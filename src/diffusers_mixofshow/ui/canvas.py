"""The canvas on which regions are drawn: a component of the page, and its value to a `Layout` and back.

The value is JSON: ``width``, ``height``, ``revision`` and ``regions``. A region is what a layout's file says of it,
with a ``name`` and a ``colour`` for the eye.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.regions import Layout
from diffusers_mixofshow.regions.drawing import COLOURS
from diffusers_mixofshow.regions.layout import FORMAT, VERSION
from diffusers_mixofshow.sampling.drawing import GRAIN


MOST_REGIONS = 24
MOST_PIXELS = 2048
"""Longest side of a picture that the page draws."""
_LARGEST = 4 * 2**20
"""Characters of a value, masks included."""
_FOR_THE_EYE = ("name", "colour")
_MASK = "data:image/png;base64,"
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_SIDES = ("width", "height")
_HERE = Path("The canvas")
"""How errors call it."""


def empty_value(width: int, height: int) -> dict[str, Any]:
    """A canvas without regions."""
    return {"width": width, "height": height, "regions": [], "revision": _revision()}


def to_value(layout: Layout, width: int, height: int) -> dict[str, Any]:
    """The canvas that shows a layout.

    Args:
        layout: Its regions, and its size if it has one.
        width: Where it has none, in pixels.
        height: Likewise.
    """
    regions = layout.describe()["regions"]
    shown = [{"name": "", "colour": COLOURS[at % len(COLOURS)], **region} for at, region in enumerate(regions)]
    size = {"width": layout.width or width, "height": layout.height or height}
    return {**size, "regions": shown, "revision": _revision()}


def to_layout(value: object, prompt: str, negative_prompt: str) -> Layout:
    """Read what the browser sent, as any stranger's file.

    Args:
        value: The canvas.
        prompt: The global prompt.
        negative_prompt: The global negative prompt; may be empty.

    Raises:
        RegionError: If it is no canvas; names every defect at once.
    """
    regions, size = _regions(value), _size(value)
    described = [{key: entry[key] for key in entry if key not in _FOR_THE_EYE} for entry in regions]
    described = [_without_empty(entry) for entry in described]
    defects = [
        f"region {number} has a mask that is no PNG of its own"
        for number, entry in enumerate(described, 1)
        if "mask" in entry and not str(entry["mask"]).startswith(_MASK)
    ]
    defects += [f"region {number} has no prompt" for number, entry in enumerate(described, 1) if not _said(entry)]
    if defects:
        raise RegionError(f"{_HERE}: {'; '.join(defects)}.")
    content = {"format": FORMAT, "version": VERSION, "regions": described}
    layout = Layout.from_description(content, _HERE)
    return Layout(layout.regions, prompt, negative_prompt or None, size["width"], size["height"])


def colours_of(value: object) -> list[str]:
    """The colour of each region, one of our own where the browser sent none that is one."""
    given = [str(entry.get("colour")) for entry in _regions(value)]
    return [colour if _COLOUR.fullmatch(colour) else COLOURS[at % len(COLOURS)] for at, colour in enumerate(given)]


def names_of(value: object) -> list[str]:
    """What the user calls each region; its number where it has no name."""
    return [str(entry.get("name") or f"Region {at}")[:40] for at, entry in enumerate(_regions(value), 1)]


def _said(entry: Mapping[str, Any]) -> bool:
    return bool(str(entry.get("prompt", "")).strip())


def _without_empty(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A region without a shape that it does not have, and an empty negative prompt, which says nothing."""
    idle = [key for key in ("box", "mask") if entry.get(key, 0) is None]
    idle += ["negative_prompt"] if not entry.get("negative_prompt", 1) else []
    return {key: value for key, value in entry.items() if key not in idle}


def _regions(value: object) -> Sequence[Mapping[str, Any]]:
    regions = value.get("regions") if isinstance(value, Mapping) else None
    if not isinstance(regions, list) or not all(isinstance(entry, Mapping) for entry in regions):
        raise RegionError("The canvas holds no regions as the page writes them. Load the page anew.")
    if len(regions) > MOST_REGIONS or len(json.dumps(value)) > _LARGEST:
        raise RegionError(f"The canvas holds {len(regions)} regions; expected at most {MOST_REGIONS}, of 4 MB in all.")
    return regions


def _size(value: object) -> dict[str, int]:
    size: dict[str, Any] = {name: value.get(name) for name in _SIDES} if isinstance(value, Mapping) else {}
    for name, pixels in size.items():
        whole = isinstance(pixels, int | float) and math.isfinite(pixels) and pixels == int(pixels)
        if not whole or not GRAIN <= pixels <= MOST_PIXELS or pixels % GRAIN:
            raise RegionError(
                f"The canvas has a {name} of {pixels!r} pixels; expected a multiple of {GRAIN} up to {MOST_PIXELS}."
            )
    return {name: int(pixels) for name, pixels in size.items()}


def _revision() -> str:
    """Another word each time, by which the browser sees that Python sent a canvas."""
    return secrets.token_hex(4)


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def component(value: Mapping[str, Any]) -> Any:
    """The canvas as a component of Gradio."""
    import gradio as gr

    return gr.HTML(
        value=dict(value),
        html_template=_file("canvas.html"),
        css_template=_file("canvas.css"),
        js_on_load=_file("canvas.js"),
        apply_default_css=False,
        elem_id="canvas",
        concepts=[],
        revision=_revision(),
    )


def naming(concepts: Sequence[str]) -> Any:
    """An update of the component: which concepts prompts may name."""
    import gradio as gr

    return gr.HTML(concepts=list(concepts), revision=_revision())
