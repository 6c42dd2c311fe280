"""Weights of regions in the cells of a feature map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from diffusers_mixofshow.regions.region import Region


def region_weights(
    regions: Sequence[Region], height: int, width: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Compute the weight of every region in every cell of a feature map.

    With m_i the part of a cell that region i covers (see `coverage`) and a_i its weight, regions of one order get
    w_i = a_i m_i / max(1, sum_j a_j m_j) of what regions of a higher order leave of the cell. So regions with the
    default settings divide a cell equally, as in the authors' code.

    Args:
        regions: Any number of regions, also none.
        height: Rows of the feature map.
        width: Columns of the feature map.
        dtype: Type of the result; computed in float64.

    Returns:
        Shape (regions, height, width), in [0, 1]. The sum over regions is at most 1; the rest of a cell belongs to the
        global prompt.
    """
    weights = torch.zeros(len(regions), height, width, dtype=torch.float64)
    left = torch.ones(height, width, dtype=torch.float64)
    for order in sorted({region.order for region in regions}, reverse=True):
        rows = [row for row, region in enumerate(regions) if region.order == order]
        level = torch.stack([regions[row].weight * coverage(regions[row], height, width) for row in rows])
        weights[rows] = left * (level / level.sum(dim=0).clamp(min=1))
        left = left - weights[rows].sum(dim=0)
    return weights.to(dtype)


def coverage(region: Region, height: int, width: int) -> torch.Tensor:
    """Compute the part of each cell that the region covers, shape (height, width), float64 in [0, 1].

    A cell belongs to a box if its centre lies inside, and to a mask if at least half of its area does. A region
    too thin for that gets the cells nearest to it. With ``rounding="inward"`` a cell must lie wholly inside. With a
    feather, a window of that size around the cell's centre is taken, and the part of it that lies inside; a region at
    the picture's border then counts as going on beyond it.
    """
    if region.feather:
        if region.box is not None:
            soft = _soft_box(region.box, region.feather, height, width)
        else:
            soft = _soft_mask(region, height, width)
        if soft.any():
            return soft
    return _find_cells(region, height, width).double()


def feature_grids(height: int, width: int) -> dict[int, tuple[int, int]]:
    """List the sizes of all feature maps that a U-Net can make of a latent, by their number of cells.

    Its stride-2 convolutions with padding 1 halve a size and round up.

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


def resolves(region: Region, height: int, width: int) -> bool:
    """Whether the region covers a cell of the feature map, without `coverage` having to give it the nearest one."""
    if region.rounding == "inward":
        return bool(_find_cells(region, height, width).any())
    if region.box is not None:
        left, top, right, bottom = region.box
        return bool(_inside(left, right, width).any() and _inside(top, bottom, height).any())
    return bool((_mask_share(region, height, width) >= 0.5).any())


def _find_cells(region: Region, height: int, width: int) -> torch.Tensor:
    """Which cells belong to the region, booleans of shape (height, width)."""
    inward = region.rounding == "inward"
    if region.box is not None:
        left, top, right, bottom = region.box
        along = _wholly_inside if inward else _centres_between
        return along(top, bottom, height)[:, None] & along(left, right, width)[None, :]
    share = _mask_share(region, height, width)
    # A mask too thin to cover half of any cell gets the cells with at least half of its largest share.
    return share >= (1 if inward else min(0.5, 0.5 * share.max().item()))


def _mask_share(region: Region, height: int, width: int) -> torch.Tensor:
    """Part of each cell's area that is inside the mask."""
    return _average_cells(region.inside, height, width)


def _average_cells(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return functional.adaptive_avg_pool2d(pixels.double()[None, None], (height, width))[0, 0]


def _centres(cells: int) -> torch.Tensor:
    return (torch.arange(cells, dtype=torch.float64) + 0.5) / cells


def _inside(start: float, end: float, cells: int) -> torch.Tensor:
    centres = _centres(cells)
    return (start <= centres) & (centres < end)


def _centres_between(start: float, end: float, cells: int) -> torch.Tensor:
    """Which of the equal cells along [0, 1] have their centre in [start, end); if none, the cell at its middle."""
    inside = _inside(start, end, cells)
    if not inside.any():
        inside[min(int((start + end) / 2 * cells), cells - 1)] = True
    return inside


def _wholly_inside(start: float, end: float, cells: int) -> torch.Tensor:
    """Which of the equal cells along [0, 1] lie in [start, end], counted as the authors' code does."""
    numbers = torch.arange(cells)
    return (math.ceil(start * cells) <= numbers) & (numbers < math.floor(end * cells))


def _soft_box(box: tuple[float, float, float, float], feather: float, height: int, width: int) -> torch.Tensor:
    left, top, right, bottom = box
    return _window_share(top, bottom, height, feather)[:, None] * _window_share(left, right, width, feather)[None, :]


def _window_share(start: float, end: float, cells: int, window: float) -> torch.Tensor:
    """Part of a window around each cell's centre that is in [start, end]; an end at 0 or 1 does not cut the window."""
    centres = _centres(cells)
    low = centres - window / 2
    high = centres + window / 2
    if start > 0:
        low = low.clamp(min=start)
    if end < 1:
        high = high.clamp(max=end)
    return ((high - low) / window).clamp(0, 1)


def _soft_mask(region: Region, height: int, width: int) -> torch.Tensor:
    """The mask's share of a window around each pixel, by differences of sums of whole numbers, which are exact."""
    counts, window = region.inside.long(), 1
    for axis in (0, 1):
        size = counts.shape[axis]
        reach = round(region.feather * size / 2)
        repeated = torch.arange(-reach, size + reach).clamp(0, size - 1)  # the pixel at the edge goes on beyond it
        sums = counts.index_select(axis, repeated).cumsum(axis)
        sums = torch.cat([torch.zeros_like(sums.narrow(axis, 0, 1)), sums], axis)
        counts = sums.narrow(axis, 2 * reach + 1, size) - sums.narrow(axis, 0, size)
        window *= 2 * reach + 1
    return _average_cells(counts.double() / window, height, width)
