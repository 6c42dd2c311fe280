"""A region: a part of the picture with a prompt of its own."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_mixofshow.errors import PictureError, RegionError
from diffusers_mixofshow.masks import read_mask


ROUNDINGS = ("nearest", "inward")

# Tolerance: an end of 0.3 must hold 3 of 10 steps, although 3 * 0.1 is above 0.3 in floating point.
_ROUNDING = 1e-9

Mask = Image.Image | np.ndarray | torch.Tensor


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the picture with a prompt of its own (section 3.4 of the paper).

    Args:
        prompt: What to draw there, e.g. ``"a <potter>, in uniform"``.
        box: Left, top, right, bottom as fractions of the picture's width and height.
        mask: Instead of a box: a picture, array or tensor of any size, shape (height, width). Inside is what is above
            one half of its range (0 to 255 for integers, 65535 for 16 bits, 0 to 1 for floats), or what is opaque in
            a picture whose alpha channel varies, or the one label or colour beside 0 or black.
        negative_prompt: What to avoid there; without it the call's negative prompt holds.
        weight: Its share where regions of one order overlap: they divide a place by their weights if these sum to 1 or
            more, and leave the rest to the global prompt if they sum to less.
        feather: Width of its soft edge, as a fraction of the picture's width and height; 0 is a sharp edge. Half of
            it lies outside the box or mask, so that neighbours with the same feather cross-fade.
        order: Regions of a higher order lie on top of those of a lower one; regions of one order share their overlap.
        guidance_scale: Guidance scale there; without it the call's.
        start: Fraction of the steps from which on it holds.
        end: Fraction of the steps until which it holds; afterwards the regions below it, or the global prompt, hold.
        control_scale: Factor on the strength of ControlNets and T2I-Adapters there.
        rounding: Which cells of a feature map are inside. ``"nearest"``: those whose centre is, and at least one.
            ``"inward"``: those that are wholly inside, as in the authors' code; a region may vanish on small maps.
        name: What people call it where regions are shown; without any effect on the picture.

    Raises:
        RegionError: If box or mask cannot be used; names every defect at once.
    """

    prompt: str
    box: tuple[float, float, float, float] | None = None
    mask: Mask | None = None
    negative_prompt: str | None = None
    weight: float = 1.0
    feather: float = 0.0
    order: int = 0
    guidance_scale: float | None = None
    start: float = 0.0
    end: float = 1.0
    control_scale: float = 1.0
    rounding: str = "nearest"
    name: str = ""

    def __post_init__(self) -> None:
        """Check the texts, the box and the mask."""
        defects = [] if isinstance(self.prompt, str) else [f"its prompt is a {type(self.prompt).__name__}, not a text"]
        if not (self.negative_prompt is None or isinstance(self.negative_prompt, str)):
            defects.append(f"its negative prompt is a {type(self.negative_prompt).__name__}, not a text")
        if not isinstance(self.name, str):
            defects.append(f"its name is a {type(self.name).__name__}, not a text")
        if (self.box is None) == (self.mask is None):
            got = "neither" if self.box is None else "both"
            defects.append(f"it needs either a box or a mask, got {got}")
        if self.box is not None:
            box, wrong = _read_box(self.box)
            object.__setattr__(self, "box", box)
            defects += wrong
        if self.mask is not None:
            defects += self._find_mask_defects()
        defects += _find_setting_defects(self)
        if defects:
            raise RegionError(f"Region {self.prompt!r}: " + "; ".join(defects) + ".")

    @cached_property
    def inside(self) -> torch.Tensor:
        """The mask, which the region must have, as booleans of shape (height, width)."""
        return read_inside(self.mask)

    def _find_mask_defects(self) -> list[str]:
        try:
            return [] if self.inside.any() else ["its mask has no pixel inside (above one half of its range)"]
        except RegionError as error:
            return [str(error)]

    def holds(self, step: int, steps: int) -> bool:
        """Whether the region holds at step 0, 1, ... of so many: if the whole step lies between start and end."""
        return contains_step(self.start, self.end, step, steps)


def contains_step(start: float, end: float, step: int, steps: int) -> bool:
    """Whether all of step 0, 1, ... of so many lies between two fractions of them, as for diffusers' ControlNets."""
    return start <= step / steps + _ROUNDING and (step + 1) / steps <= end + _ROUNDING


def _find_setting_defects(region: Region) -> list[str]:
    ranges = {
        "weight": (0, math.inf),
        "feather": (0, 1),
        "order": (-math.inf, math.inf),
        "start": (0, 1),
        "end": (0, 1),
        "control_scale": (0, math.inf),
    }
    if region.guidance_scale is not None:
        ranges["guidance_scale"] = (0, math.inf)
    defects = []
    for name, (low, high) in ranges.items():
        value = getattr(region, name)
        finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max  # isfinite() fails for 10**400
        if not finite or not low <= value <= high:
            expected = f"a number from {low} to {high}" if high <= 1 else f"a finite number{' >= 0' * (low == 0)}"
            defects.append(f"its {name} is {value!r}; expected {expected}")
    if region.weight == 0:
        defects.append("its weight is 0, so that it has no effect; leave it out")
    if not defects and region.start >= region.end:
        defects.append(f"it never holds: start {region.start} is not below end {region.end}")
    if region.rounding not in ROUNDINGS:
        defects.append(f"its rounding is {region.rounding!r}; expected one of {', '.join(ROUNDINGS)}")
    if region.rounding == "inward" and region.feather:
        defects.append(
            "its feather and rounding='inward' exclude each other, as a soft edge is not rounded; leave one out"
        )
    return defects


def _read_box(box: Iterable[Any]) -> tuple[Any, list[str]]:
    """A box of any kind as a tuple of numbers of Python, and what is wrong with it."""
    expected = "expected (left, top, right, bottom) as fractions of the picture"
    try:
        edges = tuple(edge if isinstance(edge, str) or type(edge) in (int, float) else float(edge) for edge in box)
        values = [float(edge) for edge in edges]
    except (TypeError, ValueError, OverflowError):
        return box, [f"its box is {box!r}; {expected}"]
    if any(isinstance(edge, str) for edge in edges):
        return box, [f"its box is {box!r}, of texts; {expected}, as numbers"]
    if len(values) != 4:
        return box, [f"its box has {len(values)} values; {expected}"]
    defects = []
    if not all(0 <= edge <= 1 for edge in values):
        defects.append(f"its box {tuple(values)} leaves [0, 1]; {expected}, not pixels")
    left, top, right, bottom = values
    if not left < right:
        defects.append(f"its box is empty: left {left} is not below right {right}")
    if not top < bottom:
        defects.append(f"its box is empty: top {top} is not below bottom {bottom}")
    return edges, defects


def read_inside(mask: Mask | None) -> torch.Tensor:
    """Read a mask of any kind as booleans, shape (height, width)."""
    if not isinstance(mask, Image.Image | np.ndarray | torch.Tensor):
        raise RegionError(f"its mask is a {type(mask).__name__}; expected a PIL image, an array or a tensor")
    try:
        return torch.from_numpy(read_mask(mask, called="its mask").inside)
    except PictureError as error:
        raise RegionError(str(error)) from error
