"""Regions on the feature maps of a denoiser: which context holds at which positions, in the current call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.regions import Isolation, Region, feature_grids, region_weights
from diffusers_mixofshow.regions.isolation import group_positions


# Tolerance: rounding must not give the global prompt a weight.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class RegionPlan:
    """Which context holds where, on every feature map.

    Args:
        regions: The regions; context 0 is the global prompt, context i + 1 is region i.
    """

    regions: Sequence[Region]
    _known: dict[tuple[object, ...], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def contexts(self) -> int:
        """Number of contexts: the regions and the global prompt."""
        return 1 + len(self.regions)

    @property
    def changes(self) -> bool:
        """Whether some region holds only in a part of the steps."""
        return any(region.start > 0 or region.end < 1 for region in self.regions)

    def weights(self, height: int, width: int, step: int = 0, steps: int | None = None) -> torch.Tensor:
        """Weights of all contexts on a feature map; they sum to 1 in each cell.

        Args:
            height: Rows of the feature map.
            width: Columns of the feature map.
            step: The denoising step, from 0.
            steps: Number of steps; without it all regions hold.

        Returns:
            Shape (contexts, height * width), float64.
        """
        holding = tuple(steps is None or region.holds(step, steps) for region in self.regions)
        key = (height, width, holding)
        if key not in self._known:
            present = [region for region, holds in zip(self.regions, holding, strict=True) if holds]
            shares = torch.zeros(len(self.regions), height * width, dtype=torch.float64)
            shares[list(holding)] = region_weights(present, height, width, torch.float64).flatten(1)
            rest = 1 - shares.sum(dim=0, keepdim=True)
            self._known[key] = torch.cat([rest.where(rest > _ROUNDING, 0), shares])
        return self._known[key]


@dataclass(frozen=True, eq=False)
class Placement:
    """The positions of every context on one feature map, for some rows of a batch.

    Args:
        rows: The rows of the batch.
        positions: The positions of context 0, then of context 1, ..., shape (n,).
        spans: Contexts that hold anywhere, each with the slice of `positions` that is its own.
        shares: Weight of the context at each of the positions, shape (n,); None if all are 1.
        back: Index of each position of the feature map in `positions`; None unless each occurs once.
        size: Number of positions of the feature map.
    """

    rows: slice | torch.Tensor
    positions: torch.Tensor
    spans: tuple[tuple[int, slice], ...]
    shares: torch.Tensor | None
    back: torch.Tensor | None
    size: int

    @property
    def is_sorting(self) -> bool:
        """Whether queries must be gathered; False if one context holds everywhere."""
        return len(self.spans) > 1 or len(self.positions) < self.size

    def put_back(self, outputs: torch.Tensor) -> torch.Tensor:
        """Weigh and sum the contexts' outputs, (rows, n, ...), to those of the map, (rows, positions, ...)."""
        if self.shares is None and self.back is not None:
            return outputs[:, self.back] if self.is_sorting else outputs
        if self.shares is not None:
            outputs = outputs * self.shares.to(outputs.dtype).reshape(-1, *[1] * (outputs.ndim - 2))
        blended = outputs.new_zeros(outputs.shape[0], self.size, *outputs.shape[2:])
        return blended.index_add(1, self.positions, outputs)


@dataclass(frozen=True, eq=False)
class Group:
    """Positions that attend to the same positions in self-attention, for some rows of a batch.

    Args:
        rows: The rows of the batch.
        asking: The queries' positions, shape (n,).
        asked: The keys' positions, shape (m,).
    """

    rows: slice | torch.Tensor
    asking: torch.Tensor
    asked: torch.Tensor

    def put(self, outputs: torch.Tensor, of_group: torch.Tensor) -> None:
        """Write the outputs of the group's queries, (rows, n, ...), into those of all, (batch, positions, ...)."""
        if isinstance(self.rows, slice):
            outputs[self.rows, self.asking] = of_group
        else:
            outputs[self.rows[:, None], self.asking] = of_group


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Contexts and groups on one feature map in the current call.

    Args:
        placements: Which contexts hold where, one for each different plan.
        groups: Which positions attend to which in self-attention; None if all attend to all.
    """

    placements: list[Placement]
    groups: list[Group] | None


class Canvas:
    """Plans on the feature maps of the current forward pass.

    Everything is computed before the pass, from the size of its latents, so that `torch.compile` traces only tensors.

    Args:
        plans: One for all pictures, or one for each.
        steps: Returns how many steps there will be, called in the first; without it all regions hold.
        isolation: Whether and where self-attention keeps the regions apart.
        passes: Forward passes in each step.
    """

    def __init__(
        self,
        plans: Sequence[RegionPlan],
        steps: Callable[[], int] | None = None,
        isolation: Isolation | None = None,
        passes: int = 1,
    ) -> None:
        self.plans = list(plans)
        self.contexts = max(plan.contexts for plan in self.plans)
        self.size: tuple[int, int] | None = None
        self.device: torch.device | None = None
        self.dtype: torch.dtype | None = None
        self.step = 0
        self._passes, self._passes_of_step = 0, passes
        self.steps: int | None = None
        self.isolation = isolation
        changes = any(plan.changes for plan in self.plans) or (isolation is not None and isolation.changes)
        self._ask_steps = steps if changes else None
        self._maps: dict[int, FeatureMap] = {}
        self._known: dict[tuple[object, ...], dict[int, FeatureMap]] = {}

    def prepare_pass(self, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        """Read the latent's size off the denoiser's arguments, count the pass if steps matter, and set the maps."""
        sample = inputs[0] if inputs else named["sample"]
        height, width = sample.shape[-2:]
        self.size, self.device, self.dtype = (height, width), sample.device, sample.dtype
        if self._ask_steps is not None:
            self.steps = self._ask_steps() if self.steps is None else self.steps
            self.step = self._passes // self._passes_of_step
            self._passes += 1
        isolated = self.isolation is not None and self.isolation.holds(self.step, self.steps)
        key = (self.size, self._list_holding(), isolated, len(sample), sample.device, sample.dtype)
        if key not in self._known:
            grids = feature_grids(height, width)
            self._known[key] = {cells: self._make_map(grid, sample, isolated) for cells, grid in grids.items()}
        self._maps = self._known[key]

    def placements(self, queries: torch.Tensor) -> list[Placement]:
        """Which contexts hold where on the feature map of queries (batch, positions, channels), for each plan."""
        return self._find_map(queries).placements

    def groups(self, queries: torch.Tensor) -> list[Group] | None:
        """Which positions of the queries' feature map attend to which in self-attention; None if all to all."""
        return self._find_map(queries).groups

    def _find_map(self, queries: torch.Tensor) -> FeatureMap:
        found = self._maps.get(queries.shape[1])
        if found is None:
            raise RegionError(
                f"A layer has {queries.shape[1]} positions, but the latent's feature maps have"
                f" {sorted(self._maps)}. Regions need a U-Net that halves its feature maps."
            )
        return found

    def _make_map(self, grid: tuple[int, int], sample: torch.Tensor, isolated: bool) -> FeatureMap:
        owners = self._sort_rows(len(sample))
        weights = {plan: self._weights(plan, grid) for plan, _ in owners}
        placements = [_place(weights[plan], rows, sample) for plan, rows in owners]
        if not isolated or self.isolation is None or self.size is None or not self.isolation.reaches(grid, self.size):
            return FeatureMap(placements, groups=None)
        groups = [
            Group(_move_rows(rows, sample), asking.to(sample.device), asked.to(sample.device))
            for plan, rows in owners
            for asking, asked in group_positions(weights[plan][1:])
        ]
        return FeatureMap(placements, groups)

    def blend(self, values: Callable[[Region], float], default: float, height: int, width: int) -> torch.Tensor:
        """Blend one number of each region by the weights of its attention, with `default` for the global prompt.

        Returns:
            Shape (plans, 1, height, width), float64; one plan for all pictures, or one for each.
        """
        maps = []
        for plan in self.plans:
            numbers = torch.tensor([default, *(values(region) for region in plan.regions)], dtype=torch.float64)
            maps.append((numbers @ self._weights(plan, (height, width))).reshape(1, height, width))
        return torch.stack(maps)

    def shares(self, height: int, width: int, step: int) -> list[torch.Tensor]:
        """The regions' weights at a step on a latent of this size: for each plan, of shape (regions, cells)."""
        return [plan.weights(height, width, step, self.steps)[1:] for plan in self.plans]

    def regions(self) -> list[Region]:
        """List the regions of all plans, each once."""
        return list(dict.fromkeys(region for plan in self.plans for region in plan.regions))

    def _list_holding(self) -> tuple[bool, ...]:
        """Whether each region holds in this step; empty if all always do."""
        if self.steps is None:
            return ()
        return tuple(region.holds(self.step, self.steps) for plan in self.plans for region in plan.regions)

    def _weights(self, plan: RegionPlan, grid: tuple[int, int]) -> torch.Tensor:
        return plan.weights(*grid, self.step, self.steps)

    def _sort_rows(self, rows: int) -> list[tuple[RegionPlan, slice | torch.Tensor]]:
        """Each different plan with its rows of a batch, which holds all pictures once, or several times in a row."""
        if rows % len(self.plans):
            raise RegionError(f"Got regions for {len(self.plans)} pictures, but a batch of {rows}.")
        if len(set(self.plans)) == 1:
            return [(self.plans[0], slice(None))]
        owners = [self.plans[row % len(self.plans)] for row in range(rows)]
        return [
            (plan, torch.tensor([row for row, owner in enumerate(owners) if owner is plan]))
            for plan in dict.fromkeys(self.plans)
        ]


def _move_rows(rows: slice | torch.Tensor, sample: torch.Tensor) -> slice | torch.Tensor:
    return rows if isinstance(rows, slice) else rows.to(sample.device)


def _place(weights: torch.Tensor, rows: slice | torch.Tensor, sample: torch.Tensor) -> Placement:
    """Place contexts by their weights (contexts, positions), on the device and in the dtype of `sample`."""
    places = [row.nonzero()[:, 0] for row in weights]
    spans, end = [], 0
    for context, place in enumerate(places):
        if len(place):
            spans.append((context, slice(end, end + len(place))))
            end += len(place)
    positions = torch.cat(places)
    shares = torch.cat([row[place] for row, place in zip(weights, places, strict=True)])
    once = len(positions) == weights.shape[1]
    device = sample.device
    return Placement(
        rows=_move_rows(rows, sample),
        positions=positions.to(device),
        spans=tuple(spans),
        shares=None if (shares == 1).all() else shares.to(sample.dtype).to(device),
        back=positions.argsort().to(device) if once else None,
        size=weights.shape[1],
    )
