"""Turn a map of how likely each part of a photo shows the concept into the mask of one subject. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional


_LEAST_LIKELY = 0.1
"""If the likelihood is nowhere above this, the photo does not show the subject."""
_SMALLEST, _LARGEST = 0.01, 0.95
"""Range of a usable mask, as fractions of the photo."""
_LARGEST_HOLE = 0.05
"""Largest hole that is filled, as a fraction of the subject; a larger one is background seen through it."""
_RIVAL = 0.5
"""Another part of at least this fraction of the largest part may be a second subject."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The mask of one photo, and whether it can be used.

    Args:
        mask: White where the subject is, black elsewhere; mode L, as large as the photo.
        share: Share of the photo that is white, from 0 to 1.
        defect: Why the mask cannot be used; empty if it can.
        remark: What the user should check; empty if nothing.
    """

    mask: Image.Image
    share: float
    defect: str = ""
    remark: str = ""


def outline(likelihood: np.ndarray, size: tuple[int, int], *, threshold: float = 0.5) -> Outline:
    """Cut out the largest connected part that is likely enough, with its small holes filled.

    Args:
        likelihood: Shape (rows, columns), from 0 to 1; it covers the whole photo, whatever the photo's shape.
        size: Width and height of the photo in pixels.
        threshold: Inside is where the likelihood is above this fraction of its maximum, between 0 and 1.
    """
    highest = float(likelihood.max())
    if highest < _LEAST_LIKELY:
        return Outline(mask=Image.new("L", size), share=0.0, defect="nothing of its kind was found")
    values = likelihood / highest
    parts = _label_parts(values > threshold)
    sizes = np.bincount(parts.ravel())[1:]
    subject = parts == 1 + int(sizes.argmax())
    values = np.where((parts > 0) & ~subject, 0.0, values)
    values = np.where(_find_small_holes(subject), 1.0, values)
    enlarged = Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    inside = np.asarray(enlarged) > threshold
    share = float(inside.mean())
    rivals = int((sizes >= _RIVAL * sizes.max()).sum()) - 1
    return Outline(
        mask=Image.fromarray(inside.astype(np.uint8) * 255),
        share=share,
        defect=_defect(share),
        remark="more than one was found; the mask is the largest's" if rivals else "",
    )


def _defect(share: float) -> str:
    if share < _SMALLEST:
        return f"what was found is only {share:.1%} of it"
    return f"what was found is nearly everything, {share:.0%} of it" if share > _LARGEST else ""


def _label_parts(inside: np.ndarray) -> np.ndarray:
    """Label connected parts, corners included, with 1, 2, ...; 0 outside. Shape (rows, columns), whole numbers."""
    where = torch.from_numpy(inside)[None, None]
    numbers = torch.arange(1, inside.size + 1, dtype=torch.float64).view_as(where) * where
    before = torch.zeros_like(numbers)
    while not torch.equal(before, numbers):
        before, numbers = numbers, functional.max_pool2d(numbers, 3, stride=1, padding=1) * where
    _, parts = np.unique(np.append(0, numbers.numpy()), return_inverse=True)
    return parts[1:].reshape(inside.shape)


def _find_small_holes(subject: np.ndarray) -> np.ndarray:
    """Find holes in the subject of at most `_LARGEST_HOLE`; booleans of the subject's shape."""
    parts = _label_parts(np.pad(~subject, 1, constant_values=True))
    sizes = np.bincount(parts.ravel())
    small = sizes <= _LARGEST_HOLE * subject.sum()
    small[[0, parts[0, 0]]] = False  # the subject itself, and what reaches the photo's edge
    return small[parts][1:-1, 1:-1]
