"""Move regions of a picture onto a crop of it that is enlarged and drawn alone."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_mixofshow.regions.region import Region


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A crop of a picture, enlarged in its proportions and centred on a canvas, whose rest repeats the crop's edges.

    Args:
        box: Left, top, right, bottom of the crop in pixels of the picture.
        picture: Width and height of the picture in pixels.
        canvas: Width and height of the canvas in pixels.
    """

    box: tuple[int, int, int, int]
    picture: tuple[int, int]
    canvas: tuple[int, int]

    def move(self, region: Region) -> Region | None:
        """Move a region onto the canvas; None if it lies outside of the crop.

        A feather keeps its width on the picture. Where picture and canvas have different proportions, its width is the
        mean of those along both axes.
        """
        spans = [self._find_span(axis) for axis in (0, 1)]
        placed: dict[str, Any]
        if region.box is not None:
            edges = [_move_edges(region.box[axis], region.box[axis + 2], *spans[axis]) for axis in (0, 1)]
            if any(low >= high for low, high in edges):
                return None
            placed = {"box": (edges[0][0], edges[1][0], edges[0][1], edges[1][1])}
        else:
            mask = self._move_mask(region, spans)
            if not mask.any():
                return None
            placed = {"mask": mask}
        sizes = [(high - low) / (end - start) for (start, end), (low, high) in spans]
        return dataclasses.replace(region, **placed, feather=min(1.0, region.feather * math.fsum(sizes) / 2))

    def _find_span(self, axis: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Where the crop starts and ends along an axis: on the picture, and on the canvas, as fractions of each."""
        size = (self.box[2] - self.box[0], self.box[3] - self.box[1])
        # As diffusers resizes: the crop fills the canvas along one axis, and its other side is rounded down.
        tight = 0 if self.canvas[0] / self.canvas[1] < size[0] / size[1] else 1
        along = self.canvas[axis] if axis == tight else size[axis] * self.canvas[tight] // size[tight]
        start = self.canvas[axis] // 2 - along // 2
        picture, canvas = self.picture[axis], self.canvas[axis]
        return (self.box[axis] / picture, self.box[axis + 2] / picture), (start / canvas, (start + along) / canvas)

    def _move_mask(self, region: Region, spans: list[tuple[tuple[float, float], tuple[float, float]]]) -> torch.Tensor:
        """Sample the mask at the centre of each pixel of the canvas, booleans of shape (height, width)."""
        pixels = region.inside
        columns, rows = (_find_pixels(*spans[axis], self.canvas[axis], pixels.shape[1 - axis]) for axis in (0, 1))
        return pixels[rows][:, columns]


def _move_edges(
    low: float, high: float, crop: tuple[float, float], canvas: tuple[float, float]
) -> tuple[float, float]:
    """Move an interval of the picture onto the canvas; where it reaches the crop's edge, it reaches the canvas's."""
    (start, end), (left, right) = crop, canvas
    scale = (right - left) / (end - start)
    moved_low = 0.0 if low <= start else min(1.0, left + (low - start) * scale) if low < end else 1.0
    moved_high = 1.0 if high >= end else max(0.0, left + (high - start) * scale) if high > start else 0.0
    return moved_low, moved_high


def _find_pixels(crop: tuple[float, float], canvas: tuple[float, float], cells: int, pixels: int) -> torch.Tensor:
    """Number of the mask's pixel at each cell of the canvas along one axis; outside of the crop that at its edge."""
    (start, end), (left, right) = crop, canvas
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    inside = ((centres - left) / (right - left)).clamp(0, 1)
    first, last = math.floor(start * pixels), math.ceil(end * pixels) - 1
    return ((start + inside * (end - start)) * pixels).floor().long().clamp(first, last)
