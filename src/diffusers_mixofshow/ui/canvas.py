"""The canvas on which regions are drawn: the page's component, and conversions between its value and a `Layout`.

The value is JSON: ``width``, ``height``, ``revision`` and ``regions``. A region has the entries that it has in a
layout's file, and a ``colour`` to show.
"""

from __future__ import annotations

import json
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
"""Most characters of a value, masks included."""
_ONLY_SHOWN = "colour"
_MASK = "data:image/png;base64,"
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_SIDES = ("width", "height")
_CALLED = Path("The canvas")
"""Takes the place of a file's name in errors."""


def make_empty(width: int, height: int) -> dict[str, Any]:
    """Make the value of a canvas without regions."""
    return {"width": width, "height": height, "regions": [], "revision": _draw_revision()}


def to_value(layout: Layout, width: int, height: int) -> dict[str, Any]:
    """Make the value of a canvas that shows a layout.

    Args:
        layout: The layout.
        width: Width in pixels, if the layout has none.
        height: Height in pixels, if the layout has none.
    """
    regions = layout.describe()["regions"]
    coloured = [{"name": "", "colour": COLOURS[at % len(COLOURS)], **region} for at, region in enumerate(regions)]
    size = {"width": layout.width or width, "height": layout.height or height}
    return {**size, "regions": coloured, "revision": _draw_revision()}


def to_layout(value: object, prompt: str, negative_prompt: str) -> Layout:
    """Read the value that a browser sent, checked as strictly as a stranger's file.

    Args:
        value: The canvas's value.
        prompt: The global prompt; may be empty.
        negative_prompt: The global negative prompt; may be empty.

    Raises:
        RegionError: If it is no canvas; names every defect at once.
    """
    regions, size = _read_regions(value), _read_size(value)
    described = [_drop_empty({key: entry[key] for key in entry if key != _ONLY_SHOWN}) for entry in regions]
    defects = [
        f"region {number} has a mask that is no PNG of its own"
        for number, entry in enumerate(described, 1)
        if "mask" in entry and not str(entry["mask"]).startswith(_MASK)
    ]
    defects += [
        f"{called} has no prompt; write what it shows"
        for entry, called in zip(described, call_regions(value), strict=True)
        if not str(entry.get("prompt", "")).strip()
    ]
    if defects:
        raise RegionError(f"{_CALLED}: {'; '.join(defects)}.")
    content = {"format": FORMAT, "version": VERSION, "regions": described}
    layout = Layout.from_description(content, _CALLED)
    return Layout(layout.regions, prompt or None, negative_prompt or None, size["width"], size["height"])


def read_colours(value: object) -> list[str]:
    """Read the colour of each region; one of `COLOURS` where the browser sent no valid one."""
    given = [str(entry.get("colour")) for entry in _read_regions(value)]
    return [colour if _COLOUR.fullmatch(colour) else COLOURS[at % len(COLOURS)] for at, colour in enumerate(given)]


def read_names(value: object) -> list[str]:
    """Read the name of each region; "Region" and its number where it has none."""
    return [str(entry.get("name") or f"Region {at}")[:40] for at, entry in enumerate(_read_regions(value), 1)]


def call_regions(value: object) -> list[str]:
    """Call each region in a sentence: by its number, and its name where it has one."""
    names = [str(entry.get("name") or "")[:40] for entry in _read_regions(value)]
    return [f"region {number}" + (f" ({name!r})" if name else "") for number, name in enumerate(names, 1)]


def _drop_empty(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Drop a box or mask that is None, and an empty negative prompt or name, from a region."""
    empty = [key for key in ("box", "mask") if entry.get(key, 0) is None]
    empty += [key for key in ("negative_prompt", "name") if not entry.get(key, 1)]
    return {key: value for key, value in entry.items() if key not in empty}


def _read_regions(value: object) -> Sequence[Mapping[str, Any]]:
    regions = value.get("regions") if isinstance(value, Mapping) else None
    if not isinstance(regions, list) or not all(isinstance(entry, Mapping) for entry in regions):
        raise RegionError("The canvas holds no regions as the page writes them. Reload the page.")
    if len(regions) > MOST_REGIONS or len(json.dumps(value)) > _LARGEST:
        raise RegionError(f"The canvas holds {len(regions)} regions; expected at most {MOST_REGIONS}, of 4 MB in all.")
    return regions


def _read_size(value: object) -> dict[str, int]:
    size: dict[str, Any] = {name: value.get(name) for name in _SIDES} if isinstance(value, Mapping) else {}
    for name, pixels in size.items():
        is_size = isinstance(pixels, int | float) and GRAIN <= pixels <= MOST_PIXELS and pixels % GRAIN == 0
        if not is_size:
            raise RegionError(
                f"The canvas has a {name} of {pixels!r} pixels; expected a multiple of {GRAIN} up to {MOST_PIXELS}."
            )
    return {name: int(pixels) for name, pixels in size.items()}


def _draw_revision() -> str:
    """Draw a random text, by whose change the browser sees that Python sent a new value."""
    return secrets.token_hex(4)


@cache
def _read_file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def make_component(value: Mapping[str, Any]) -> Any:
    """Make the canvas as a component of Gradio."""
    import gradio as gr

    return gr.HTML(
        value=dict(value),
        html_template=_read_file("canvas.html"),
        css_template=_read_file("canvas.css"),
        js_on_load=_read_file("canvas.js"),
        apply_default_css=False,
        elem_id="canvas",
        concepts=[],
        revision=_draw_revision(),
    )


def update_concepts(concepts: Sequence[str]) -> Any:
    """Make an update of the component with the concepts that prompts may name."""
    import gradio as gr

    return gr.HTML(concepts=list(concepts), revision=_draw_revision())
