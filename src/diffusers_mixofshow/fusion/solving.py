"""From sources and what their layers see to fused layers: the one place where a method is applied to all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args
from zlib import crc32

import torch

from diffusers_mixofshow.base_models import devices
from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.edlora.low_rank import input_widths
from diffusers_mixofshow.errors import FusionError, first_line
from diffusers_mixofshow.families import Family, family_of_sites
from diffusers_mixofshow.families.recognition import family_of_updates
from diffusers_mixofshow.fusion.compression import GramFactor, GramSum, matrix_of
from diffusers_mixofshow.fusion.merging import dare_merged, summed, svd_merged, ties_merged
from diffusers_mixofshow.fusion.ridge import chosen_ridge, chosen_ridge_of_factors
from diffusers_mixofshow.fusion.sketch import WIDEST_MATRIX
from diffusers_mixofshow.fusion.solvers import (
    FactorInverter,
    Factors,
    InverseOfFactor,
    at_most_full_rank,
    condition_number,
    factorise,
    fused_update,
    lbfgs,
    overlaps,
    recompressed,
    relative_residual,
    target_rows,
    weighted_average,
)
from diffusers_mixofshow.fusion.sources import Source, shares
from diffusers_mixofshow.fusion.statistics import PARTS, GramStatistics, Part, summed_factor, summed_gram
from diffusers_mixofshow.fusion.team import Team


Method = Literal["closed-form", "lbfgs", "average", "sum", "ties", "dare", "svd"]
METHODS: tuple[Method, ...] = get_args(Method)
MEASURED: tuple[Method, ...] = ("closed-form", "lbfgs")
"""Methods that need statistics; the others see only the updates."""

Ridge = float | Literal["auto"]

Device = str | torch.device

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
    ridge: Ridge = 1e-3
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


Gram = torch.Tensor | GramFactor
"""A Gram matrix, (in_features, in_features), float64, or its low-rank factor."""

Overlaps = dict[tuple[str, str], float]
"""Pair of sources to how much they ask for the same place of the input space; see `solvers.overlaps`."""


def check_device(device: Device) -> None:
    """Raise a `FusionError` if layers cannot be solved on a device."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise FusionError(
            f"Layers cannot be solved on device={str(device)!r}: {first_line(error)}. Expected a device with float64, "
            f"of those that this machine has: {devices()}."
        ) from error


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


@dataclass(frozen=True)
class Sums:
    """All that the objective needs to know of the sources at one input, their shares in it.

    Args:
        gram: Sum of the Gram matrices, (in_features, in_features); a factor of it where it is wide.
        met: Site to what the sources ask of it, see `target_rows`; (sum_i r_i, in_features).
    """

    gram: Gram
    met: Mapping[str, torch.Tensor]


class SharedInput:
    """What all layers that read one input have in common, worked out when it is needed and once for all of them.

    Matrices of the sources are read one at a time and summed, so that memory does not grow with their number.

    Args:
        family: Whose layers they are.
        sources: What to fuse.
        statistics: What was recorded, or nothing for methods that do not ask.
        sites: Layers that share the input.
        prior: Gram matrix whose outputs shall stay the base's, its weight in it; (in_features, in_features), or a
            factor of it.
        team: The processes that share the sources.
        device: Where sums are taken and solved, in float64.
    """

    def __init__(
        self,
        family: Family,
        sources: Sequence[Source],
        statistics: Statistics,
        sites: Sequence[str],
        prior: Gram | None = None,
        team: Team | None = None,
        device: Device = "cpu",
    ) -> None:
        """Read no matrix yet."""
        self.family, self.name, self.device = family, family.input_of(sites[0]), device
        self.prior = prior.to(device) if isinstance(prior, torch.Tensor) else prior
        self.sources, self.weights = sources, shares(sources)
        self.updates = {site: updates_of(sources, site, device) for site in sites}
        self.width = next(iter(self.updates.values()))[0].down.shape[1]
        self._statistics = statistics
        self._team = Team() if team is None else team
        self._sums: dict[Part | None, Sums] = {}
        self._inverses: dict[float, torch.Tensor | InverseOfFactor] = {}

    def grams(self, part: Part | None = None) -> Iterator[tuple[int, Gram]]:
        """Place and Gram matrix of each source that this process has, one at a time.

        Shape (in_features, in_features), float64; or its low-rank factor where it is kept as one.
        """
        for place, concepts in enumerate(self._statistics):
            if not concepts:
                continue
            factor = summed_factor(concepts, self.name, part)
            gram = summed_gram(concepts, self.name, part).to(self.device) if factor is None else factor
            width = (gram.rows if isinstance(gram, GramFactor) else gram).shape[1]
            if width != self.width:
                raise FusionError(
                    f"Statistics of {self.name} must be {(self.width, self.width)} for these ED-LoRAs, got "
                    f"{self.sources[place].name} {(width, width)}. They were recorded on another model; record "
                    "them on the one that the ED-LoRAs were tuned on."
                )
            yield place, gram

    def sums(self, part: Part | None = None) -> Sums:
        """The sums over all sources of all processes."""
        if part not in self._sums:
            as_matrix = self.width <= WIDEST_MATRIX or self._team.size > 1
            total = GramSum(self.width, self.device, as_matrix=as_matrix)
            met = {
                site: torch.cat([torch.zeros_like(one.down) for one in self.updates[site]]) for site in self.updates
            }
            blocks = {site: rows.split([len(one.down) for one in self.updates[site]]) for site, rows in met.items()}
            for place, gram in self.grams(part):
                weight = self.weights[place]
                total.add(gram, weight)
                for site, updates in self.updates.items():
                    blocks[site][place].copy_(weight * target_rows([updates[place]], [gram]))
            summed_rows = {site: self._team.summed(rows) for site, rows in met.items()}
            value = total.value
            if isinstance(value, torch.Tensor):
                value = self._team.summed(value)
            self._sums[part] = Sums(value, summed_rows)
        return self._sums[part]

    @property
    def parts(self) -> set[Part]:
        """Which parts every concept that this process has was recorded in."""
        mine = [set(one.parts) for concepts in self._statistics for one in concepts]
        return set.intersection(set(PARTS), *mine)

    @cached_property
    def total(self) -> Gram:
        """Sum of the Gram matrices, and the prior."""
        return self._with_prior(self.sums().gram)

    @cached_property
    def fitted(self) -> Gram:
        """The same of the fitted part alone."""
        return self._with_prior(self.sums("fit").gram)

    @cached_property
    def spectrum(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues and eigenvectors of the fitted part, prior included."""
        values, vectors = torch.linalg.eigh(matrix_of(self.fitted))
        return values.clamp_min(0), vectors

    def inverse(self, ridge: float) -> torch.Tensor | InverseOfFactor:
        """Inverse of sum_i G_i + prior + lambda I, see `factorise`."""
        if ridge not in self._inverses:
            total = self.total
            if isinstance(total, GramFactor):
                self._inverses[ridge] = FactorInverter(total, self.device).inverse(ridge)
            else:
                self._inverses[ridge] = factorise([total], ridge)
        return self._inverses[ridge]

    def condition(self, ridge: float) -> float:
        """Condition number of the matrix that `inverse` inverts."""
        inverse = self.inverse(ridge)
        if isinstance(inverse, InverseOfFactor):
            return inverse.condition
        damped = matrix_of(self.total).clone()
        damped.diagonal().add_(ridge * damped.diagonal().mean())
        return condition_number(damped, inverse)

    def _with_prior(self, gram: Gram) -> Gram:
        if self.prior is None:
            return gram
        as_matrix = isinstance(gram, torch.Tensor)
        total = GramSum(self.width, self.device, as_matrix=as_matrix)
        total.add(gram, 1.0)
        total.add(self.prior, 1.0)
        return total.value


def solve_input(
    family: Family,
    sources: Sequence[Source],
    statistics: Statistics,
    sites: Sequence[str],
    settings: Settings,
    prior: Gram | None = None,
    team: Team | None = None,
    device: Device = "cpu",
) -> Solution:
    """Fuse the layers that read one input.

    Args:
        family: Whose layers they are.
        sources: What to fuse.
        statistics: What was recorded of each; empty for methods that do not ask, which then report no residuals.
        sites: Layers that share an input.
        settings: How.
        prior: See `SharedInput`.
        team: See `SharedInput`; the residuals are those of the sources that this process has.
        device: See `SharedInput`; the result is on the CPU.

    Raises:
        FusionError: If a Gram matrix is singular, or a ridge is to be chosen and nothing was held out.
    """
    shared, solution = SharedInput(family, sources, statistics, sites, prior, team, device), Solution()
    for site in sites:
        fused, numbers = SOLVERS[settings.method](shared, site, settings)
        low_rank, kept = _low_rank(fused, settings.max_rank)
        convolution = any(source.edlora.lora[site].convolution for source in sources if site in source.edlora.lora)
        solution.lora[site] = replace(low_rank, convolution=convolution)
        solution.layers[site] = numbers | ({} if kept == 1 else {"energy_kept": kept})
    if statistics:
        solution.residuals = _residuals(shared, solution.lora)
        table = overlaps(shared.updates[sites[0]], shared.sums().met[sites[0]]).tolist()
        solution.overlaps, solution.inputs = _pairs([source.name for source in sources], table), 1
    return solution


def _residuals(shared: SharedInput, lora: Mapping[str, LowRank]) -> dict[str, dict[str, tuple[float, float]]]:
    """Site to source to relative residual under the weighted average and after fusion."""
    fused = {site: _factors(lora[site], shared.device) for site in shared.updates}
    average = {site: weighted_average(updates, shared.weights) for site, updates in shared.updates.items()}
    found: dict[str, dict[str, tuple[float, float]]] = {site: {} for site in shared.updates}
    for place, gram in shared.grams():
        name = shared.sources[place].name
        for site, updates in shared.updates.items():
            own = updates[place]
            found[site][name] = (
                relative_residual(average[site], own, gram),
                relative_residual(fused[site], own, gram),
            )
    return found


def family_of_sources(sources: Sequence[Source]) -> Family:
    """The family whose layers the sources change."""
    return family_of_updates(
        input_widths({site: one for source in sources for site, one in source.edlora.lora.items()})
    )


def sites_of(sources: Sequence[Source]) -> tuple[str, ...]:
    """Every layer that any source changes, each once."""
    return tuple(dict.fromkeys(site for source in sources for site in source.edlora.lora))


def updates_of(sources: Sequence[Source], site: str, device: Device = "cpu") -> list[Factors]:
    """Every source's update of a layer, of rank 0 where it leaves the layer alone."""
    present = next(source.edlora.lora[site] for source in sources if site in source.edlora.lora)
    shape = (present.up.shape[0], present.down.shape[1])
    return [source.factors(site, shape).to(device) for source in sources]


Solved = tuple[Factors, dict[str, float]]


def _solve_closed_form(shared: SharedInput, site: str, settings: Settings) -> Solved:
    ridge, numbers, updates = settings.ridge, {}, shared.updates[site]
    if ridge == "auto":
        if shared.parts != {"fit", "held_out"}:
            raise FusionError(
                "ridge='auto' judges a ridge by inputs that were held out, and these statistics have none. "
                "Record with two prompts or more for each concept, or give the ridge as a number, such as 1e-2."
            )
        fitted, asked = shared.sums("fit"), shared.sums("held_out")
        given = (updates, fitted.met[site], asked.met[site])
        if isinstance(asked.gram, GramFactor) and isinstance(shared.fitted, GramFactor):
            ridge, error = chosen_ridge_of_factors(*given, asked.gram, shared.fitted)
        else:
            ridge, error = chosen_ridge(*given, matrix_of(asked.gram), shared.spectrum)
        numbers["held_out_residual"] = max(0.0, error) ** 0.5
    fused = fused_update(updates, shared.sums().met[site], shared.inverse(ridge))
    return fused, {"ridge": ridge, "condition": shared.condition(ridge)} | numbers


def _solve_lbfgs(shared: SharedInput, site: str, settings: Settings) -> Solved:
    steps = LBFGS_STEPS["text" if shared.family.stage_of(site).text_alone else "spatial"]
    return lbfgs(shared.updates[site], shared.sums().met[site], shared.total, steps=steps), {"steps": steps}


SOLVERS: Mapping[str, Callable[[SharedInput, str, Settings], Solved]] = {
    "closed-form": _solve_closed_form,
    "lbfgs": _solve_lbfgs,
    "average": lambda shared, site, settings: (weighted_average(shared.updates[site], shared.weights), {}),
    "sum": lambda shared, site, settings: (summed(shared.updates[site]), {}),
    "ties": lambda shared, site, settings: (ties_merged(shared.updates[site], shared.weights), {}),
    "dare": lambda shared, site, settings: (
        dare_merged(shared.updates[site], shared.weights, seed=crc32(site.encode())),
        {},
    ),
    "svd": lambda shared, site, settings: (svd_merged(shared.updates[site], shared.weights), {}),
}
"""Method to solver, all with one signature: the input and what the sources want there, the layer, settings."""


def _low_rank(update: Factors, max_rank: int | None) -> tuple[LowRank, float]:
    update, kept = at_most_full_rank(update), 1.0
    if max_rank is not None and len(update.down) > max_rank:
        update, kept = recompressed(update, max_rank)
    down, up = update.down.cpu().float().contiguous(), update.up.cpu().float().contiguous()
    return LowRank(down=down, up=up, alpha=float(len(down))), kept


def _factors(update: LowRank, device: Device) -> Factors:
    return Factors(down=update.scaling * update.down.double(), up=update.up.double()).to(device)


def _pairs(names: Sequence[str], table: Sequence[Sequence[float]]) -> Overlaps:
    """Every pair of names once, from a symmetric table."""
    return {(one, names[j]): table[i][j] for i, one in enumerate(names) for j in range(i + 1, len(names))}


def check_recorded(sources: Sequence[Source], statistics: Statistics, sites: Sequence[str]) -> None:
    """Raise one `FusionError` that names the sources whose statistics lack an input of the sites."""
    needed = set(family_of_sites(sites).by_input(sites))
    lacking = []
    for source, concepts in zip(sources, statistics, strict=True):
        if missing := sorted({name for name in needed for one in concepts if name not in one.inputs}):
            lacking.append(f"{source.name} {len(missing)} (first {missing[0]})")
    if lacking:
        raise FusionError(
            f"Statistics lack inputs of layers that are to be fused: {', '.join(lacking)}. Record them again "
            "with GradientFuser(pipe).record(source, alongside=[...]), all other sources named, on a model that has "
            "all of these layers."
        )
