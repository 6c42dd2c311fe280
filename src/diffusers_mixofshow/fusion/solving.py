"""From sources and what their layers see to fused layers: the one place where a method is applied to all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args
from zlib import crc32

import torch

from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.fusion.merging import dare_merged, summed, svd_merged, ties_merged
from diffusers_mixofshow.fusion.ridge import chosen_ridge
from diffusers_mixofshow.fusion.solvers import (
    Factors,
    at_most_full_rank,
    condition_number,
    factorise,
    fused_update,
    lbfgs,
    met_rows,
    overlaps,
    recompressed,
    relative_residual,
    weighted_average,
)
from diffusers_mixofshow.fusion.sources import Source, shares
from diffusers_mixofshow.fusion.statistics import PARTS, GramStatistics, Part, input_name, summed_gram
from diffusers_mixofshow.fusion.team import Team


Method = Literal["closed-form", "lbfgs", "average", "sum", "ties", "dare", "svd"]
METHODS: tuple[Method, ...] = get_args(Method)
MEASURED: tuple[Method, ...] = ("closed-form", "lbfgs")
"""Methods that need statistics; the others see only the updates."""

Ridge = float | Literal["auto"]

LBFGS_STEPS = {"text": 500, "spatial": 50}
"""The paper's settings (section 6.1): text layers and text keys and values, and the other layers."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How layers are solved.

    Args:
        method: One of `METHODS`.
        ridge: Weight of small updates against a perfect fit, as a fraction of the mean squared feature; ``auto``
            picks it for every layer by the inputs held out.
        max_rank: Fused updates of a higher rank are cut down to it; by default none is, beyond the layer's own.
    """

    method: Method = "closed-form"
    ridge: Ridge = 1e-2
    max_rank: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that make no sense; reports every defect at once."""
        defects = []
        if self.method not in METHODS:
            defects.append(f"unknown method {self.method!r}, expected {', '.join(map(repr, METHODS))}")
        if self.ridge != "auto" and not (isinstance(self.ridge, int | float) and 0 <= self.ridge < float("inf")):
            defects.append(f"ridge must be 'auto' or 0 or more, got {self.ridge!r}; usual values are 1e-3 to 1e-1")
        if self.max_rank is not None and self.max_rank < 1:
            defects.append(f"max_rank must be at least 1, got {self.max_rank}")
        if defects:
            raise FusionError("Fusion settings: " + "; ".join(defects))


Overlaps = dict[tuple[str, str], float]
"""Pair of sources to how much they ask for the same place of the input space; see `solvers.overlaps`."""


@dataclass
class Solution:
    """Fused layers, and what is to be said about them.

    Args:
        lora: Site to fused update.
        residuals: Site to source to relative residual under the weighted average and after fusion.
        layers: Site to further numbers: ridge, condition, energy kept.
        overlaps: Pair of sources to their overlap, summed over inputs.
        inputs: How many inputs the overlaps were summed over.
    """

    lora: dict[str, LowRank] = field(default_factory=dict)
    residuals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    overlaps: Overlaps = field(default_factory=dict)
    inputs: int = 0

    def add(self, other: Solution) -> None:
        """Take over what was solved for other layers."""
        self.lora |= other.lora
        self.residuals |= other.residuals
        self.layers |= other.layers
        self.inputs += other.inputs
        for pair, value in other.overlaps.items():
            self.overlaps[pair] = self.overlaps.get(pair, 0.0) + value


Statistics = Sequence[Sequence[GramStatistics]]
"""For each source, the statistics of its concepts; none of a source that another process has."""


class SharedInput:
    """What all layers that read one input have in common, worked out when it is needed and once for all of them.

    Args:
        name: The input, see `input_name`.
        width: Its number of features.
        statistics: What was recorded, or nothing for methods that do not ask.
        weights: Share of each source.
        prior: Gram matrix whose outputs shall stay the base's, its weight in it; (in_features, in_features).
        team: The processes that share the sources.
    """

    def __init__(
        self,
        name: str,
        width: int,
        statistics: Statistics,
        weights: Sequence[float],
        prior: torch.Tensor | None = None,
        team: Team | None = None,
    ) -> None:
        """Read no matrix yet."""
        self.name, self.width, self.weights, self.prior = name, width, weights, prior
        self._statistics = statistics
        self._team = Team() if team is None else team
        self._inverses: dict[float, torch.Tensor] = {}

    @cached_property
    def grams(self) -> list[torch.Tensor | None]:
        """G_i of each source, (in_features, in_features), its concepts together; None if another process has it."""
        return self._grams(None)

    @property
    def parts(self) -> set[Part]:
        """Which parts every concept that this process has was recorded in."""
        mine = [set(one.parts) for concepts in self._statistics for one in concepts]
        return set.intersection(set(PARTS), *mine)

    @cached_property
    def total(self) -> torch.Tensor:
        """Sum of the weighted Gram matrices, and the prior."""
        return self._total(self.grams)

    def met(self, updates: Sequence[Factors]) -> torch.Tensor:
        """What the sources ask of a layer, see `met_rows`, weighted; (sum_i r_i, in_features)."""
        return self._met(updates, self.grams)

    def held_out(self, updates: Sequence[Factors]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a ridge is judged by: rows met when fitting, rows asked for when held out, the latter's Gram matrix."""
        fitted, held_out = self._halves
        return self._met(updates, fitted), self._met(updates, held_out), self._held_out_total

    @cached_property
    def spectrum(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues and eigenvectors of the fitted part, prior included."""
        values, vectors = torch.linalg.eigh(self._total(self._halves[0]))
        return values.clamp_min(0), vectors

    def inverse(self, ridge: float) -> torch.Tensor:
        """Inverse of sum_i G_i + prior + lambda I, see `factorise`."""
        if ridge not in self._inverses:
            self._inverses[ridge] = factorise([self.total], ridge)
        return self._inverses[ridge]

    def condition(self, ridge: float) -> float:
        """Condition number of the matrix that `inverse` inverts."""
        damping = ridge * self.total.diagonal().mean()
        damped = self.total + damping * torch.eye(self.width, dtype=self.total.dtype)
        return condition_number(damped, self.inverse(ridge))

    @cached_property
    def _halves(self) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        return self._grams("fit"), self._grams("held_out")

    @cached_property
    def _held_out_total(self) -> torch.Tensor:
        return self._team.summed(self._weighted_sum(self._halves[1]))

    def _grams(self, part: Part | None) -> list[torch.Tensor | None]:
        return [summed_gram(concepts, self.name, part) if concepts else None for concepts in self._statistics]

    def _met(self, updates: Sequence[Factors], grams: Sequence[torch.Tensor | None]) -> torch.Tensor:
        weights = [
            torch.full((len(update.down), 1), weight, dtype=torch.float64)
            for update, weight in zip(updates, self.weights, strict=True)
        ]
        return self._team.summed(torch.cat(weights) * met_rows(updates, grams))

    def _total(self, grams: Sequence[torch.Tensor | None]) -> torch.Tensor:
        total = self._team.summed(self._weighted_sum(grams))
        return total if self.prior is None else total + self.prior

    def _weighted_sum(self, grams: Sequence[torch.Tensor | None]) -> torch.Tensor:
        total = torch.zeros(self.width, self.width, dtype=torch.float64)
        for weight, gram in zip(self.weights, grams, strict=True):
            if gram is not None:
                total += weight * gram
        return total


def solve_input(
    sources: Sequence[Source],
    statistics: Statistics,
    sites: Sequence[str],
    settings: Settings,
    prior: torch.Tensor | None = None,
    team: Team | None = None,
) -> Solution:
    """Fuse the layers that read one input.

    Args:
        sources: What to fuse.
        statistics: What was recorded of each; empty for methods that do not ask, which then report no residuals.
        sites: Layers that share an input.
        settings: How.
        prior: See `SharedInput`.
        team: See `SharedInput`; the residuals are those of the sources that this process has.

    Raises:
        FusionError: If a Gram matrix is singular, or a ridge is to be chosen and nothing was held out.
    """
    width = updates_of(sources, sites[0])[0].down.shape[1]
    shared = SharedInput(input_name(sites[0]), width, statistics, shares(sources), prior, team)
    solution = Solution()
    if statistics:
        _check_inputs(shared, sources)
    for site in sites:
        updates = updates_of(sources, site)
        fused, numbers = SOLVERS[settings.method](shared, updates, settings, site)
        low_rank, kept = _low_rank(fused, settings.max_rank)
        convolution = any(source.edlora.lora[site].convolution for source in sources if site in source.edlora.lora)
        solution.lora[site] = replace(low_rank, convolution=convolution)
        solution.layers[site] = numbers | ({} if kept == 1 else {"energy_kept": kept})
        if statistics:
            average = weighted_average(updates, shared.weights)
            packed = _factors(solution.lora[site])
            solution.residuals[site] = {
                source.name: (relative_residual(average, own, gram), relative_residual(packed, own, gram))
                for source, own, gram in zip(sources, updates, shared.grams, strict=True)
                if gram is not None
            }
    if statistics:
        first = updates_of(sources, sites[0])
        solution.overlaps, solution.inputs = _overlaps(sources, first, shared.met(first)), 1
    return solution


def by_input(sites: Sequence[str]) -> list[tuple[str, ...]]:
    """Group layers that read the same input."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(input_name(site), []).append(site)
    return [tuple(group) for group in groups.values()]


def sites_of(sources: Sequence[Source]) -> tuple[str, ...]:
    """Every layer that any source changes, each once."""
    return tuple(dict.fromkeys(site for source in sources for site in source.edlora.lora))


def updates_of(sources: Sequence[Source], site: str) -> list[Factors]:
    """Every source's update of a layer, of rank 0 where it leaves the layer alone."""
    present = next(source.edlora.lora[site] for source in sources if site in source.edlora.lora)
    shape = (present.up.shape[0], present.down.shape[1])
    return [source.factors(site, shape) for source in sources]


def is_text_input(name: str) -> bool:
    """Whether an input is made of tokens: the text encoder's layers, and the keys and values of cross-attention."""
    return name.startswith("text_encoder") or name.endswith(".attn2.to_k+to_v")


Solved = tuple[Factors, dict[str, float]]


def _solve_closed_form(shared: SharedInput, updates: Sequence[Factors], settings: Settings, site: str) -> Solved:
    ridge, numbers = settings.ridge, {}
    if ridge == "auto":
        if shared.parts != {"fit", "held_out"}:
            raise FusionError(
                "ridge='auto' judges a ridge by inputs that were held out, and these statistics have none. "
                "Record with two prompts or more for each concept, or give the ridge as a number, such as 1e-2."
            )
        ridge, error = chosen_ridge(updates, *shared.held_out(updates), shared.spectrum)
        numbers["held_out_residual"] = max(0.0, error) ** 0.5
    fused = fused_update(updates, shared.met(updates), shared.inverse(ridge))
    return fused, {"ridge": ridge, "condition": shared.condition(ridge)} | numbers


def _solve_lbfgs(shared: SharedInput, updates: Sequence[Factors], settings: Settings, site: str) -> Solved:
    steps = LBFGS_STEPS["text" if is_text_input(shared.name) else "spatial"]
    return lbfgs(updates, shared.met(updates), shared.total, steps=steps), {"steps": steps}


SOLVERS: Mapping[str, Callable[[SharedInput, Sequence[Factors], Settings, str], Solved]] = {
    "closed-form": _solve_closed_form,
    "lbfgs": _solve_lbfgs,
    "average": lambda shared, updates, settings, site: (weighted_average(updates, shared.weights), {}),
    "sum": lambda shared, updates, settings, site: (summed(updates), {}),
    "ties": lambda shared, updates, settings, site: (ties_merged(updates, shared.weights), {}),
    "dare": lambda shared, updates, settings, site: (
        dare_merged(updates, shared.weights, seed=crc32(site.encode())),
        {},
    ),
    "svd": lambda shared, updates, settings, site: (svd_merged(updates, shared.weights), {}),
}
"""Method to solver, all with one signature: the input that layers share, one update per source, settings, the site."""


def _low_rank(update: Factors, max_rank: int | None) -> tuple[LowRank, float]:
    update, kept = at_most_full_rank(update), 1.0
    if max_rank is not None and len(update.down) > max_rank:
        update, kept = recompressed(update, max_rank)
    down, up = update.down.float().contiguous(), update.up.float().contiguous()
    return LowRank(down=down, up=up, alpha=float(len(down))), kept


def _factors(update: LowRank) -> Factors:
    return Factors(down=update.scaling * update.down.double(), up=update.up.double())


def _overlaps(sources: Sequence[Source], updates: Sequence[Factors], met: torch.Tensor) -> Overlaps:
    table = overlaps(updates, met).tolist()
    return {
        (one.name, other.name): table[i][j]
        for i, one in enumerate(sources)
        for j, other in enumerate(sources)
        if i < j
    }


def _check_inputs(shared: SharedInput, sources: Sequence[Source]) -> None:
    """Refuse statistics that were recorded on layers of another width."""
    width = shared.width
    pairs = zip(sources, shared.grams, strict=True)
    shapes = {source.name: tuple(gram.shape) for source, gram in pairs if gram is not None}
    wrong = [f"{name} {shape}" for name, shape in shapes.items() if shape != (width, width)]
    if wrong:
        raise FusionError(
            f"Statistics of {shared.name} must be ({width}, {width}) for these ED-LoRAs, got {', '.join(wrong)}. "
            "They were recorded on another model; record them on the one that the ED-LoRAs were tuned on."
        )


def check_recorded(sources: Sequence[Source], statistics: Statistics, sites: Sequence[str]) -> None:
    """Raise one `FusionError` that names the sources whose statistics lack an input of the sites."""
    needed = {input_name(site) for site in sites}
    lacking = []
    for source, concepts in zip(sources, statistics, strict=True):
        if missing := sorted({name for name in needed for one in concepts if name not in one.inputs}):
            lacking.append(f"{source.name} {len(missing)} (first {missing[0]})")
    if lacking:
        raise FusionError(
            f"Statistics lack inputs of layers that are to be fused: {', '.join(lacking)}. Record them again on a "
            "model that has all of these layers."
        )
