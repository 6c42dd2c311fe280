"""From how likely each part of a photo belongs to the concept, to the mask of one subject. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional


_LEAST_LIKELY = 0.1
"""A photo that is nowhere likelier than this does not show it."""
_SMALLEST, _LARGEST = 0.01, 0.95
"""Of the photo, as fractions: what is smaller or larger is no subject that could be cut out."""
_LARGEST_HOLE = 0.05
"""Of the subject, as a fraction: a hole that is larger is background seen through it."""
_RIVAL = 0.5
"""Of the subject, as a fraction: another part that is as large as this may be a second one."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What was found in one photo.

    Args:
        mask: White where the subject is, black elsewhere; mode L, as large as the photo.
        share: Of the photo that is white, from 0 to 1.
        defect: Why it cannot be used as a mask; empty if it can.
        remark: What the user should look at; empty if nothing.
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
        threshold: Inside is what is likelier than this part of the likeliest place, above 0 and below 1.
    """
    highest = float(likelihood.max())
    if highest < _LEAST_LIKELY:
        return Outline(mask=Image.new("L", size), share=0.0, defect="nothing of its kind was found")
    values = likelihood / highest
    parts = _parts(values > threshold)
    sizes = np.bincount(parts.ravel())[1:]
    subject = parts == 1 + int(sizes.argmax())
    values = np.where((parts > 0) & ~subject, 0.0, values)
    values = np.where(_small_holes(subject), 1.0, values)
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


def _parts(inside: np.ndarray) -> np.ndarray:
    """Number connected parts from 1 on, also across corners; 0 outside. Shape (rows, columns), whole numbers."""
    where = torch.from_numpy(inside)[None, None]
    numbers = torch.arange(1, inside.size + 1, dtype=torch.float64).view_as(where) * where
    before = torch.zeros_like(numbers)
    while not torch.equal(before, numbers):
        before, numbers = numbers, functional.max_pool2d(numbers, 3, stride=1, padding=1) * where
    _, parts = np.unique(np.append(0, numbers.numpy()), return_inverse=True)
    return parts[1:].reshape(inside.shape)


def _small_holes(subject: np.ndarray) -> np.ndarray:
    """Where the subject is not, but is all around, and the hole is small."""
    parts = _parts(np.pad(~subject, 1, constant_values=True))
    sizes = np.bincount(parts.ravel())
    small = sizes <= _LARGEST_HOLE * subject.sum()
    small[[0, parts[0, 0]]] = False  # the subject itself, and what reaches the photo's edge
    return small[parts][1:-1, 1:-1]
