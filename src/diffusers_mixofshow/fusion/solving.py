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
from diffusers_mixofshow.fusion.gram import Device, Gram, Inverse, sum_grams
from diffusers_mixofshow.fusion.merging import dare_merged, summed, svd_merged, ties_merged
from diffusers_mixofshow.fusion.ridge import choose_ridge
from diffusers_mixofshow.fusion.solvers import (
    Factors,
    at_most_full_rank,
    closed_form,
    closed_form_in_span,
    lbfgs,
    overlaps,
    recompressed,
    relative_residual,
    target_rows,
    weighted_average,
)
from diffusers_mixofshow.fusion.sources import Source, shares
from diffusers_mixofshow.fusion.statistics import PARTS, GramStatistics, Part
from diffusers_mixofshow.fusion.team import Team
from diffusers_mixofshow.progress import progress


Method = Literal["closed-form", "lbfgs", "ssr", "average", "sum", "ties", "dare", "svd"]
METHODS: tuple[Method, ...] = get_args(Method)
MEASURED: tuple[Method, ...] = ("closed-form", "lbfgs", "ssr")
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
    ridge: Ridge = 1e-3
    max_rank: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that make no sense; reports every defect at once."""
        defects = []
        if self.method not in METHODS:
            defects.append(f"unknown method {self.method!r}, expected {', '.join(map(repr, METHODS))}")
        if self.ridge != "auto" and not (isinstance(self.ridge, int | float) and 0 <= self.ridge < float("inf")):
            defects.append(f"ridge must be 'auto' or 0 or more, got {self.ridge!r}; usual values are 1e-3 to 1e-1")
        if self.method == "ssr" and self.ridge == "auto":
            defects.append("ridge 'auto' is for 'closed-form'; give 'ssr' a number, such as 1e-3")
        if self.max_rank is not None and self.max_rank < 1:
            defects.append(f"max_rank must be at least 1, got {self.max_rank}")
        if defects:
            raise FusionError("Fusion settings: " + "; ".join(defects))


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
        gram: Sum of the Gram matrices, (in_features, in_features).
        targets: Site to what the sources ask of it, see `target_rows`; (sum_i r_i, in_features).
    """

    gram: Gram
    targets: Mapping[str, torch.Tensor]


class SharedInput:
    """What all layers that read one input have in common, worked out when it is needed and once for all of them.

    Matrices of the sources are read one at a time and summed, so that memory does not grow with their number.

    Args:
        family: Whose layers they are.
        sources: What to fuse.
        statistics: What was recorded, or nothing for methods that do not ask.
        sites: Layers that share the input.
        prior: Gram matrix whose outputs shall stay the base's, its weight in it; (in_features, in_features).
        device: Where sums are taken and solved, in float64.
    """

    def __init__(
        self,
        family: Family,
        sources: Sequence[Source],
        statistics: Statistics,
        sites: Sequence[str],
        prior: Gram | None = None,
        device: Device = "cpu",
    ) -> None:
        """Read no matrix yet."""
        self.family, self.name, self.device = family, family.input_of(sites[0]), device
        self.sources, self.weights = sources, shares(sources)
        self.updates = {site: updates_of(sources, site, device) for site in sites}
        self.width = next(iter(self.updates.values()))[0].down.shape[1]
        self._prior = None if prior is None else prior.to(device)
        self._statistics, self._team = statistics, Team.present()
        self._sums: dict[Part | None, Sums] = {}
        self._inverses: dict[float, Inverse] = {}

    def grams(self, part: Part | None = None) -> Iterator[tuple[int, Gram]]:
        """Place and Gram matrix of each source that this process has, one at a time.

        Concepts of a source share one update, and every one of them weighs the same.
        """
        for place, concepts in enumerate(self._statistics):
            if not concepts:
                continue
            gram = sum_grams((one.gram(self.name, part), 1.0) for one in concepts).to(self.device)
            if gram.width != self.width:
                raise FusionError(
                    f"Statistics of {self.name} must be {(self.width, self.width)} for these ED-LoRAs, got "
                    f"{self.sources[place].name} {(gram.width, gram.width)}. They were recorded on another model; "
                    "record them on the one that the ED-LoRAs were tuned on."
                )
            yield place, gram

    def sums(self, part: Part | None = None) -> Sums:
        """The sums over all sources of all processes."""
        if part not in self._sums:
            ranks = {site: [len(one.down) for one in updates] for site, updates in self.updates.items()}
            targets = {
                site: torch.zeros(sum(rank), self.width, dtype=torch.float64, device=self.device)
                for site, rank in ranks.items()
            }
            blocks = {site: rows.split(ranks[site]) for site, rows in targets.items()}

            def weighted() -> Iterator[tuple[Gram, float]]:
                for place, gram in self.grams(part):
                    for site, updates in self.updates.items():
                        asked = target_rows([updates[place]], [gram])
                        blocks[site][place].copy_(self.weights[place] * asked)
                    yield gram, self.weights[place]

            gram = self._team.sum_gram(weighted(), self.width, self.device)
            self._sums[part] = Sums(gram, {site: self._team.summed(rows) for site, rows in targets.items()})
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

    def _with_prior(self, gram: Gram) -> Gram:
        return gram if self._prior is None else sum_grams([(gram, 1.0), (self._prior, 1.0)])

    def inverse(self, ridge: float) -> Inverse:
        """Inverse of sum_i G_i + prior + lambda I."""
        if ridge not in self._inverses:
            self._inverses[ridge] = self.total.inverse(ridge)
        return self._inverses[ridge]


def solve(
    sources: Sequence[Source],
    statistics: Statistics,
    sites: Sequence[str],
    settings: Settings,
    *,
    prior: Mapping[str, Gram] | None = None,
    device: Device = "cpu",
    told: str = "Solving",
    pipe: object = None,
) -> Solution:
    """Fuse layers, those that read one input together.

    Every process of a team solves every layer from the same sums, so that all of them hold the same fused layers.

    Args:
        sources: What to fuse.
        statistics: What was recorded of each; empty for methods that do not ask, which then report no residuals.
        sites: The layers.
        settings: How.
        prior: Input to the Gram matrix whose outputs shall stay the base's, its weight in it.
        device: Where sums are taken and solved, in float64; the result is on the CPU.
        told: What progress calls it.
        pipe: The pipeline that they were recorded with, which may have its progress bars switched off.

    Raises:
        FusionError: If a Gram matrix is singular, or a ridge is to be chosen and nothing was held out.
    """
    family, solution = family_of_sources(sources), Solution()
    groups = family.by_input(sites)
    with progress(told, len(groups), pipe=pipe) as bar:
        for name, group in groups.items():
            shared = SharedInput(family, sources, statistics, group, (prior or {}).get(name), device)
            solution.add(_solve_input(shared, settings, measured=bool(statistics)))
            bar.update()
    found = {(site, name): pair for site, layer in solution.residuals.items() for name, pair in layer.items()}
    solution.residuals = {site: {} for site in solution.residuals}
    for (site, name), pair in Team.present().joined(found).items():  # each measured by the process that has it
        solution.residuals[site][name] = pair
    return solution


def _solve_input(shared: SharedInput, settings: Settings, *, measured: bool) -> Solution:
    """Fuse the layers that read one input; the residuals are those of the sources that this process has."""
    solution = Solution()
    for site in shared.updates:
        fused, numbers = SOLVERS[settings.method](shared, site, settings)
        low_rank, kept = _low_rank(fused, settings.max_rank)
        own = [source.edlora.lora[site] for source in shared.sources if site in source.edlora.lora]
        solution.lora[site] = replace(low_rank, convolution=any(update.convolution for update in own))
        solution.layers[site] = numbers | ({} if kept == 1 else {"energy_kept": kept})
    if measured:
        solution.residuals = _residuals(shared, solution.lora)
        site, names = next(iter(shared.updates)), [source.name for source in shared.sources]
        table = overlaps(shared.updates[site], shared.sums().targets[site]).tolist()
        solution.overlaps, solution.inputs = _pairs(names, table), 1
    return solution


def _residuals(shared: SharedInput, lora: Mapping[str, LowRank]) -> dict[str, dict[str, tuple[float, float]]]:
    """Site to source to relative residual under the weighted average and after fusion."""
    fused = {site: Factors.of(lora[site]).to(shared.device) for site in shared.updates}
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
        held_out = shared.sums("held_out")
        targets = (shared.sums("fit").targets[site], held_out.targets[site])
        ridge, error = choose_ridge(updates, *targets, held_out.gram, shared.fitted)
        numbers["held_out_residual"] = max(0.0, error) ** 0.5
    inverse = shared.inverse(ridge)
    fused = closed_form(updates, shared.sums().targets[site], inverse)
    return fused, {"ridge": ridge, "condition": inverse.condition} | numbers


def _solve_lbfgs(shared: SharedInput, site: str, settings: Settings) -> Solved:
    steps = LBFGS_STEPS["text" if shared.family.stage_of(site).text_alone else "spatial"]
    return lbfgs(shared.updates[site], shared.sums().targets[site], shared.total, steps=steps), {"steps": steps}


def _solve_in_span(shared: SharedInput, site: str, settings: Settings) -> Solved:
    ridge = float(settings.ridge)
    return closed_form_in_span(shared.updates[site], shared.sums().targets[site], shared.total, ridge), {
        "ridge": ridge
    }


SOLVERS: Mapping[str, Callable[[SharedInput, str, Settings], Solved]] = {
    "closed-form": _solve_closed_form,
    "lbfgs": _solve_lbfgs,
    "ssr": _solve_in_span,
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
