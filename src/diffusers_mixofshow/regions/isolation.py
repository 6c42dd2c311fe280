"""Keep regions apart in self-attention: which positions may attend to which."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch

from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.regions.region import contains_step


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """In self-attention, keep the queries of one region from the keys of another (cf. LoRA-Composer, 2403.11627).

    A region's queries attend to its own positions and to those of no region; queries outside of all regions attend
    everywhere.

    Args:
        start: Fraction of the steps from which on the regions are kept apart.
        end: Fraction of the steps until which they are.
        scales: Feature maps on which they are, by the width of a map's cell in latent cells: 1 for maps of the
            latent's size, 2 for those of half of it, and so on. All by default.

    Raises:
        RegionError: Names every defect at once.
    """

    start: float = 0.0
    end: float = 1.0
    scales: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the fractions and the scales."""
        defects = [
            f"its {name} is {value!r}; expected a number from 0 to 1"
            for name, value in (("start", self.start), ("end", self.end))
            if not isinstance(value, int | float) or not 0 <= value <= 1
        ]
        if not defects and self.start >= self.end:
            defects.append(f"it never holds: start {self.start} is not below end {self.end}")
        if self.scales is not None and not _are_powers_of_two(self.scales):
            defects.append(f"its scales are {self.scales!r}; expected powers of two, such as (2, 4, 8)")
        if defects:
            raise RegionError("Isolation: " + "; ".join(defects) + ".")

    @property
    def changes(self) -> bool:
        """Whether it holds only in a part of the steps."""
        return self.start > 0 or self.end < 1

    def holds(self, step: int, steps: int | None) -> bool:
        """Whether it holds at step 0, 1, ... of so many; without a number, at all steps."""
        return steps is None or contains_step(self.start, self.end, step, steps)

    def reaches(self, grid: tuple[int, int], latent: tuple[int, int]) -> bool:
        """Whether it holds on a feature map of this size."""
        return self.scales is None or 2 ** round(math.log2(latent[0] / grid[0])) in self.scales


def _are_powers_of_two(scales: object) -> bool:
    """Whether these are some powers of two, in a list or the like."""
    return (
        isinstance(scales, Sequence | Set)
        and bool(scales)
        and all(isinstance(scale, int) and scale > 0 and not scale & (scale - 1) for scale in scales)
    )


def group_positions(weights: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Group positions by what they attend to: every key that shares a region with the query, or is in none.

    Args:
        weights: Weight of every region at every position, shape (regions, positions); above 0 is inside.

    Returns:
        For each group the positions of its queries, and those of their keys. Every position is a query of one group.
    """
    inside = weights > 0
    owners, group = inside.T.unique(dim=0, return_inverse=True)
    free = ~inside.any(dim=0)
    groups = []
    for number, owner in enumerate(owners):
        keys = inside[owner].any(dim=0) | free if owner.any() else torch.ones_like(free)
        groups.append(((group == number).nonzero()[:, 0], keys.nonzero()[:, 0]))
    return groups
