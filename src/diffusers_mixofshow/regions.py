"""Where a prompt holds: boxes and masks, and their weights on a feature grid. Pure geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from diffusers_mixofshow.errors import RegionError


Mask = Image.Image | np.ndarray | torch.Tensor


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the picture with a prompt of its own (section 3.4 of the paper).

    Args:
        prompt: What to draw there, e.g. ``"a <potter>, in uniform"``.
        box: Left, top, right, bottom as fractions of the picture's width and height.
        mask: Instead of a box: a picture, array or tensor of any size, shape (height, width); pixels above one
            half of its range (0 to 255 for integers, 0 to 1 otherwise) are inside.
        negative_prompt: What to avoid there; without it the call's own negative prompt holds.

    Raises:
        RegionError: If box or mask cannot be used; names every defect at once.
    """

    prompt: str
    box: tuple[float, float, float, float] | None = None
    mask: Mask | None = None
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        """Check the texts, the box and the mask."""
        defects = [] if isinstance(self.prompt, str) else [f"its prompt is a {type(self.prompt).__name__}, not a text"]
        if not (self.negative_prompt is None or isinstance(self.negative_prompt, str)):
            defects.append(f"its negative prompt is a {type(self.negative_prompt).__name__}, not a text")
        if (self.box is None) == (self.mask is None):
            got = "neither" if self.box is None else "both"
            defects.append(f"it needs either a box or a mask, got {got}")
        if self.box is not None:
            defects += _box_defects(self.box)
        if self.mask is not None:
            defects += _mask_defects(self.mask)
        if defects:
            raise RegionError(f"Region {self.prompt!r}: " + "; ".join(defects) + ".")


def region_weights(regions: Sequence[Region], height: int, width: int) -> torch.Tensor:
    """Weight of every region in every cell of a feature grid.

    A cell belongs to a box if its centre lies inside, and to a mask if at least half of its area does. A region
    too thin for that gets the cells nearest to it. Regions that share a cell share it equally.

    Args:
        regions: Any number of regions, also none.
        height: Rows of the grid.
        width: Columns of the grid.

    Returns:
        Shape (regions, height, width), float32 in [0, 1]. The sum over regions is at most 1; the rest of a cell
        is the global prompt's.
    """
    if not regions:
        return torch.zeros(0, height, width)
    inside = torch.stack([_cells(region, height, width) for region in regions]).float()
    return inside / inside.sum(dim=0).clamp(min=1)


def feature_grids(height: int, width: int) -> dict[int, tuple[int, int]]:
    """Sizes of all feature maps that a U-Net can make of a latent, by their number of cells.

    A stride-2 convolution with padding 1 halves and rounds up.

    Args:
        height: Rows of the latent.
        width: Columns of the latent.

    Returns:
        Cells to (rows, columns), e.g. 4096 to (64, 64), 1024 to (32, 32), ... 1 to (1, 1).
    """
    grids = {height * width: (height, width)}
    while height * width > 1:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
        grids[height * width] = (height, width)
    return grids


def _box_defects(box: Sequence[float]) -> list[str]:
    expected = "expected (left, top, right, bottom) as fractions of the picture"
    try:
        values = [float(edge) for edge in box]
    except (TypeError, ValueError):
        return [f"its box is {box!r}; {expected}"]
    if len(values) != 4:
        return [f"its box has {len(values)} values; {expected}"]
    defects = []
    if not all(0 <= edge <= 1 for edge in values):
        defects.append(f"its box {tuple(values)} leaves [0, 1]; {expected}, not pixels")
    left, top, right, bottom = values
    if not left < right:
        defects.append(f"its box is empty: left {left} is not below right {right}")
    if not top < bottom:
        defects.append(f"its box is empty: top {top} is not below bottom {bottom}")
    return defects


def _mask_defects(mask: Mask) -> list[str]:
    try:
        inside = _pixels_inside(mask)
    except RegionError as error:
        return [str(error)]
    return [] if inside.any() else ["its mask has no pixel inside (above one half of its range)"]


def _pixels_inside(mask: Mask) -> torch.Tensor:
    """Read a mask of any kind as booleans, shape (height, width)."""
    if isinstance(mask, Image.Image):
        mask = np.array(mask.convert("L"))
    if not isinstance(mask, np.ndarray | torch.Tensor):
        raise RegionError(f"its mask is a {type(mask).__name__}; expected a PIL image, an array or a tensor")
    pixels = torch.as_tensor(mask).detach().cpu()
    while pixels.ndim > 2 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim != 2 or not pixels.numel():
        raise RegionError(f"its mask has shape {tuple(mask.shape)}; expected (height, width)")
    limit = 1 if pixels.is_floating_point() or pixels.dtype == torch.bool else 255
    pixels = pixels.double()
    low, high = pixels.min().item(), pixels.max().item()
    if not 0 <= low <= high <= limit:
        raise RegionError(f"its mask's values run from {low} to {high}; expected 0 to {limit}")
    # Integers that are 0 or 1 throughout are booleans in disguise.
    return pixels > (0 if limit == 255 and high == 1 else limit / 2)


def _cells(region: Region, height: int, width: int) -> torch.Tensor:
    """Which cells belong to the region, booleans of shape (height, width), at least one of them true."""
    if region.box is not None:
        left, top, right, bottom = region.box
        return _centres_between(top, bottom, height)[:, None] & _centres_between(left, right, width)[None, :]
    if region.mask is None:
        raise RegionError(f"Region {region.prompt!r} has neither a box nor a mask.")
    pixels = _pixels_inside(region.mask).float()
    share = functional.adaptive_avg_pool2d(pixels[None, None], (height, width))[0, 0]
    # share > 0 somewhere, so a thin mask keeps the cells that hold most of it.
    return share >= min(0.5, 0.5 * share.max().item())


def _centres_between(start: float, end: float, cells: int) -> torch.Tensor:
    """Which of the equal cells along [0, 1] have their centre in [start, end), or else the cell at the middle."""
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    inside = (start <= centres) & (centres < end)
    if not inside.any():
        inside[min(int((start + end) / 2 * cells), cells - 1)] = True
    return inside
