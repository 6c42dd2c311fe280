"""Solve all layers of a fusion: combines the sources' updates and statistics, layer by layer, by the chosen method."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Literal, get_args
from zlib import crc32

import torch

from diffusers_mixofshow.base_models import list_devices
from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.edlora.low_rank import input_widths
from diffusers_mixofshow.errors import FusionError, first_line
from diffusers_mixofshow.families import Family, family_of_sites
from diffusers_mixofshow.families.recognition import family_of_updates
from diffusers_mixofshow.fusion.gram import Device, Gram, GramFactor, Inverse, sum_grams
from diffusers_mixofshow.fusion.merging import merge_dare, merge_svd, merge_ties
from diffusers_mixofshow.fusion.ridge import choose_ridge
from diffusers_mixofshow.fusion.solvers import (
    Factors,
    Parts,
    closed_form,
    closed_form_in_span,
    lbfgs,
    limit_rank,
    overlaps,
    relative_residuals,
    weighted_average,
)
from diffusers_mixofshow.fusion.sources import Source, shares
from diffusers_mixofshow.fusion.statistics import PARTS, GramStatistics, Part
from diffusers_mixofshow.fusion.team import Team
from diffusers_mixofshow.progress import progress


Method = Literal["closed-form", "lbfgs", "ssr", "average", "sum", "ties", "dare", "svd"]
METHODS: tuple[Method, ...] = get_args(Method)
MEASURED: tuple[Method, ...] = ("closed-form", "lbfgs", "ssr")
"""Methods that need statistics; the others use the updates alone."""

Ridge = float | Literal["auto"]

_RIDGE_IN_STAGES, _RIDGE_OF_OWN_FEATURES = 2.5e-5, 2.5e-4
"""Default ridge for each input feature: 0.003 and 0.03 on Toyland, 0.03 and 0.3 at a width of 1280."""
_WIDEST_MEASURED = 1280
"""Width up to which the default ridge grows; nothing was measured beyond."""

_MOST_AT_ONCE = 4
"""Inputs that a CPU solves at once: each needs memory of its own."""

LBFGS_STEPS = {"text": 500, "spatial": 50}
"""The paper's iterations (section 6.1) for layers whose input is the text alone, and for the others."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How layers are solved.

    Args:
        method: One of `METHODS`.
        ridge: Ridge penalty, as a fraction of the mean squared feature; ``auto`` chooses it for every layer by the
            error on held-out inputs. None: in proportion to the layer's width, see `ridge_of`.
        in_stages: Whether inputs were recorded on a model with the layers of earlier stages fused.
        max_rank: Fused updates of a higher rank are truncated to it; by default only to the layer's full rank.
    """

    method: Method = "closed-form"
    ridge: Ridge | None = None
    max_rank: int | None = None
    in_stages: bool = False

    def ridge_of(self, width: int) -> float:
        """The ridge of a layer with so many input features.

        Features of a few prompts say less and less of a wider layer's inputs. Where each concept's own model made
        them, they also differ from those of the fused model, and a larger ridge tolerates that.
        """
        usual = _RIDGE_IN_STAGES if self.in_stages else _RIDGE_OF_OWN_FEATURES
        return usual * min(width, _WIDEST_MEASURED) if self.ridge is None else float(self.ridge)

    def __post_init__(self) -> None:
        """Check the settings; one error lists every defect."""
        defects = []
        if self.method not in METHODS:
            defects.append(f"unknown method {self.method!r}, expected {', '.join(map(repr, METHODS))}")
        if self.ridge not in (None, "auto") and not (
            isinstance(self.ridge, int | float) and 0 <= self.ridge < float("inf")
        ):
            defects.append(f"ridge must be 'auto' or 0 or more, got {self.ridge!r}; usual values are 1e-3 to 1e-1")
        if self.method == "ssr" and self.ridge == "auto":
            defects.append("ridge 'auto' is for 'closed-form'; give 'ssr' a number, such as 1e-3")
        if self.max_rank is not None and not (isinstance(self.max_rank, Integral) and int(self.max_rank) >= 1):
            defects.append(f"max_rank must be None or a whole number of at least 1, got {self.max_rank!r}")
        if defects:
            raise FusionError("Fusion settings: " + "; ".join(defects))


def check_device(device: Device) -> None:
    """Raise a `FusionError` if layers cannot be solved on a device."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise FusionError(
            f"Layers cannot be solved on device={str(device)!r}: {first_line(error)}. Expected a device with float64; "
            f"this machine has: {list_devices()}."
        ) from error


@dataclass
class Solution:
    """Fused layers and the numbers for their report.

    Args:
        lora: Site to fused update.
        residuals: Site to source to the relative residuals of the weighted average and of the fusion.
        layers: Site to further numbers: ridge, condition, energy kept.
        overlaps: Pair of sources to their overlap, see `solvers.overlaps`, summed over inputs.
        inputs: Number of inputs over which overlaps were summed.
    """

    lora: dict[str, LowRank] = field(default_factory=dict)
    residuals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    overlaps: dict[tuple[str, str], float] = field(default_factory=dict)
    inputs: int = 0

    def add(self, other: Solution) -> None:
        """Add the solution of other layers."""
        self.lora |= other.lora
        self.residuals |= other.residuals
        self.layers |= other.layers
        self.inputs += other.inputs
        for pair, value in other.overlaps.items():
            self.overlaps[pair] = self.overlaps.get(pair, 0.0) + value


Statistics = Sequence[Sequence[GramStatistics]]
"""For each source, the statistics of its concepts; empty for a source of another process."""


@dataclass(frozen=True)
class Sums:
    """Both sides of the normal equations for one input, summed over sources and weighted by share.

    Args:
        gram: Sum of the Gram matrices, (in_features, in_features).
        targets: Site to its right-hand side, see `target_rows`; (sum_i r_i, in_features).
    """

    gram: Gram
    targets: Mapping[str, torch.Tensor]


class SharedInput:
    """Sums and inverses that all layers of one input share, computed once, on first use.

    Full Gram matrices of the sources are read one at a time and summed: memory does not grow with their number.

    Args:
        family: Family of the base model.
        sources: What to fuse.
        statistics: Statistics of the sources; empty for methods that need none.
        sites: Layers that share the input.
        prior: Weighted Gram matrix of prompts without concepts, whose outputs are to be kept; (in_features,
            in_features).
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
        """Keep the arguments; no matrix is read yet."""
        self.family, self.name, self.device = family, family.input_of(sites[0]), device
        self.sources, self.weights = sources, shares(sources)
        self.sites, self.width = sites, updates_of(sources, sites[0])[0].down.shape[1]
        self._prior = None if prior is None else prior.to(device)
        self._statistics, self._team = statistics, Team.current()
        self._sums: dict[Part | None, Sums] = {}
        self._inverses: dict[float, Inverse] = {}
        self._factors: dict[int, GramFactor] = {}

    def updates(self, site: str) -> list[Factors]:
        """Every source's update of a layer; not kept, as hundreds of layers can share an input."""
        return updates_of(self.sources, site, self.device)

    def grams(self, part: Part | None = None) -> Iterator[tuple[int, Gram]]:
        """Index and Gram matrix of each source of this process, one at a time.

        Concepts of one source share its updates and have equal weights. Low-rank factors of all parts together are
        kept for the next call, as they are small; full matrices are read again.
        """
        for place, concepts in enumerate(self._statistics):
            if not concepts:
                continue
            if part is None and place in self._factors:
                yield place, self._factors[place]
                continue
            gram = sum_grams((one.gram(self.name, part), 1.0) for one in concepts).to(self.device)
            if gram.width != self.width:
                raise FusionError(
                    f"Statistics of {self.name} must be {(self.width, self.width)} for these LoRAs, got "
                    f"{self.sources[place].name} {(gram.width, gram.width)}. They were recorded on another model; "
                    "record them on the one that the LoRAs were tuned on."
                )
            if part is None and isinstance(gram, GramFactor):
                self._factors[place] = gram
            yield place, gram

    def sums(self, part: Part | None = None) -> Sums:
        """The sums over all sources of all processes."""
        if part not in self._sums:
            downs = {site: [update.down for update in self.updates(site)] for site in self.sites}
            targets = {site: [down.new_zeros(()).expand_as(down) for down in rows] for site, rows in downs.items()}

            def weighted() -> Iterator[tuple[Gram, float]]:
                for place, gram in self.grams(part):
                    for site, rows in downs.items():
                        targets[site][place] = self.weights[place] * gram.multiply(rows[place])
                    yield gram, self.weights[place]

            gram = self._team.sum_gram(weighted(), self.width, self.device)
            stacked = {site: self._team.all_reduce(torch.cat(rows)) for site, rows in targets.items()}
            self._sums[part] = Sums(gram, stacked)
        return self._sums[part]

    @property
    def parts(self) -> set[Part]:
        """The parts that were recorded for every concept of this process."""
        mine = [set(one.parts) for concepts in self._statistics for one in concepts]
        return set.intersection(set(PARTS), *mine)

    @cached_property
    def total(self) -> Gram:
        """Sum of the Gram matrices of all parts, plus the prior."""
        return self._with_prior(self.sums().gram)

    @cached_property
    def fitted(self) -> Gram:
        """Sum of the Gram matrices of the ``fit`` part, plus the prior."""
        return self._with_prior(self.sums("fit").gram)

    @cached_property
    def columns(self) -> dict[int, slice]:
        """Which columns of an image by `total` belong to each source; of use if `total` is a low-rank factor."""
        ends = itertools.accumulate((len(factor.rows) for factor in self._factors.values()), initial=0)
        return {place: slice(*own) for place, own in zip(self._factors, itertools.pairwise(ends), strict=True)}

    def add_images(self, updates: Sequence[Factors]) -> list[Factors]:
        """The same updates with their images by `total`."""
        images = self.total.image(torch.cat([update.down for update in updates]))
        parts = images.split([len(update.down) for update in updates])
        return [replace(update, image=image) for update, image in zip(updates, parts, strict=True)]

    def image_of_targets(self, updates: Sequence[Factors]) -> torch.Tensor | None:
        """Image of the right-hand side by `total`, from those of all updates; None if `total` is a dense matrix.

        With F_i the rows of concept i in F, G_i = F_i^T F_i + t_i I and C_i = A_i F^T, the image of A_i G_i is
        (A_i G_i) F^T = (A_i F_i^T) (F_i F^T) + t_i C_i.
        """
        if not isinstance(self.total, GramFactor):
            return None
        images = [update.image for update in updates if update.image is not None]
        return torch.cat(
            [
                torch.addmm(image, image[:, own], self.total.core[own], beta=weight * self._factors[place].tail)
                for image, weight, (place, own) in zip(images, self.weights, self.columns.items(), strict=True)
            ]
        )

    def image_by_own(self, place: int, gram: Gram, image: torch.Tensor) -> torch.Tensor:
        """Image of rows by one source's Gram matrix, from that by `total`."""
        if not isinstance(self.total, GramFactor):
            return gram.image(image)
        return image[:, self.columns[place]] / self.weights[place] ** 0.5

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
    description: str = "Solving",
    pipe: object = None,
) -> Solution:
    """Fuse layers, grouped by the input that they share. Every process of a team solves all layers.

    Args:
        sources: What to fuse.
        statistics: Statistics of each; may be empty for methods that need none, and then no residual is reported.
        sites: The layers.
        settings: How to solve.
        prior: Input to the weighted Gram matrix of prompts without concepts, whose outputs are to be kept.
        device: Where sums are taken and solved, in float64; the result is on the CPU.
        description: Label of the progress bar.
        pipe: The pipeline, whose setting shows or hides progress bars.

    Raises:
        FusionError: If a Gram matrix is singular, or ridge is ``auto`` without held-out inputs.
    """
    family, solution = family_of_sources(sources), Solution()
    groups = family.by_input(sites)

    def solve_input(name: str) -> Solution:
        shared = SharedInput(family, sources, statistics, groups[name], (prior or {}).get(name), device)
        return _solve_input(shared, settings, measured=bool(statistics))

    with progress(description, len(groups), pipe=pipe) as bar:
        for solved in _solve_inputs(solve_input, groups, device):
            solution.add(solved)
            bar.update()
    found = {(site, name): pair for site, layer in solution.residuals.items() for name, pair in layer.items()}
    solution.residuals = {site: {} for site in solution.residuals}
    for (site, name), pair in Team.current().all_gather(found).items():  # each process measures its own sources
        solution.residuals[site][name] = pair
    return solution


def _solve_inputs(solve_input: Callable[[str], Solution], names: Iterable[str], device: Device) -> Iterator[Solution]:
    """The solution of each input, in order; a CPU's threads solve several at once, as each has small matrices only.

    Processes of a team take their common sums in one order, and a GPU is busy with one input.
    """
    threads = torch.get_num_threads()
    at_once = min(threads, _MOST_AT_ONCE) if torch.device(device).type == "cpu" and Team.current().size == 1 else 1
    if at_once == 1:
        yield from map(solve_input, names)
        return
    torch.set_num_threads(threads // at_once)  # of each thread that starts from now on
    try:
        with ThreadPoolExecutor(at_once) as pool:
            yield from pool.map(solve_input, names)
    finally:
        torch.set_num_threads(threads)


def _solve_input(shared: SharedInput, settings: Settings, *, measured: bool) -> Solution:
    """Fuse the layers of one input; residuals are of this process's sources only."""
    solution, parts = Solution(), {}
    for site in shared.sites:
        updates = shared.add_images(shared.updates(site)) if measured else shared.updates(site)
        fused, numbers = SOLVERS[settings.method](shared, site, updates, settings)
        fused, kept = limit_rank(fused, settings.max_rank)
        own = [source.edlora.lora[site] for source in shared.sources if site in source.edlora.lora]
        solution.lora[site] = LowRank(
            down=fused.down.cpu().float().contiguous(),
            up=fused.up.cpu().float().contiguous(),
            alpha=float(len(fused.down)),
            convolution=any(update.convolution for update in own),
        )
        solution.layers[site] = numbers | ({} if kept == 1 else {"energy_kept": kept})
        if measured:
            parts[site] = Parts.of([*updates, *(shared.add_images([fused]) if fused.image is None else [fused])])
    if measured:
        first, names = shared.sites[0], [source.name for source in shared.sources]
        table = overlaps(shared.updates(first), shared.sums().targets[first]).tolist()
        pairs = itertools.combinations(range(len(names)), 2)
        solution.overlaps, solution.inputs = {(names[i], names[j]): table[i][j] for i, j in pairs}, 1
    solution.residuals = _residuals(shared, parts)
    return solution


def _residuals(shared: SharedInput, parts: Mapping[str, Parts]) -> dict[str, dict[str, tuple[float, float]]]:
    """Site to source to the relative residuals of the weighted average and of the fusion.

    Args:
        shared: The input that the sites share.
        parts: Site to the parts of every source's update and, last, of the fused one.
    """
    shares_of_average = torch.tensor([*shared.weights, 0.0], dtype=torch.float64, device=shared.device)
    found: dict[str, dict[str, tuple[float, float]]] = {site: {} for site in parts}
    for place, gram in shared.grams():
        for site, one in parts.items():
            merged = torch.stack([shares_of_average[one.owner], one.owner == len(shared.sources)])
            mine = replace(one, image=shared.image_by_own(place, gram, one.image))
            average, fused = relative_residuals(mine, merged, one.owner == place, gram)
            found[site][shared.sources[place].name] = (average, fused)
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
    """Every source's update of a layer; rank 0 if it does not change the layer."""
    present = next(source.edlora.lora[site] for source in sources if site in source.edlora.lora)
    shape = (present.up.shape[0], present.down.shape[1])
    return [source.factors(site, shape).to(device) for source in sources]


Solved = tuple[Factors, dict[str, float]]


def _solve_closed_form(shared: SharedInput, site: str, updates: Sequence[Factors], settings: Settings) -> Solved:
    numbers = {}
    if settings.ridge == "auto":
        if shared.parts != {"fit", "held_out"}:
            raise FusionError(
                "ridge='auto' needs held-out inputs, and these statistics have none. "
                "Record with two prompts or more for each concept, or give the ridge as a number, such as 1e-2."
            )
        held_out = shared.sums("held_out")
        targets = (shared.sums("fit").targets[site], held_out.targets[site])
        ridge, error = choose_ridge(updates, *targets, held_out.gram, shared.fitted)
        numbers["held_out_residual"] = max(0.0, error) ** 0.5
    else:
        ridge = settings.ridge_of(shared.width)
    inverse = shared.inverse(ridge)
    fused = closed_form(updates, shared.sums().targets[site], inverse, shared.image_of_targets(updates))
    return fused, {"ridge": ridge, "condition": inverse.condition} | numbers


def _solve_lbfgs(shared: SharedInput, site: str, updates: Sequence[Factors], settings: Settings) -> Solved:
    steps = LBFGS_STEPS["text" if shared.family.stage_of(site).text_alone else "spatial"]
    return lbfgs(updates, shared.sums().targets[site], shared.total, steps=steps), {"steps": steps}


def _solve_in_span(shared: SharedInput, site: str, updates: Sequence[Factors], settings: Settings) -> Solved:
    ridge = settings.ridge_of(shared.width)
    return closed_form_in_span(updates, shared.sums().targets[site], shared.total, ridge), {"ridge": ridge}


SOLVERS: Mapping[str, Callable[[SharedInput, str, Sequence[Factors], Settings], Solved]] = {
    "closed-form": _solve_closed_form,
    "lbfgs": _solve_lbfgs,
    "ssr": _solve_in_span,
    "average": lambda shared, site, updates, settings: (weighted_average(updates, shared.weights), {}),
    "sum": lambda shared, site, updates, settings: (weighted_average(updates, [1.0] * len(updates)), {}),
    "ties": lambda shared, site, updates, settings: (merge_ties(updates, shared.weights), {}),
    "dare": lambda shared, site, updates, settings: (
        merge_dare(updates, shared.weights, seed=crc32(site.encode())),
        {},
    ),
    "svd": lambda shared, site, updates, settings: (merge_svd(updates, shared.weights), {}),
}
"""Method to solver; all take the shared input, the layer's site, every source's update of it and the settings."""


def check_recorded(sources: Sequence[Source], statistics: Statistics, sites: Sequence[str]) -> None:
    """Raise a `FusionError` that names every source whose statistics lack an input of the sites."""
    needed = set(family_of_sites(sites).by_input(sites))
    lacking = []
    for source, concepts in zip(sources, statistics, strict=True):
        if missing := sorted({name for name in needed for one in concepts if name not in one.inputs}):
            lacking.append(f"{source.name} {len(missing)} (first {missing[0]})")
    if lacking:
        raise FusionError(
            f"Statistics lack inputs of layers that are to be fused: {', '.join(lacking)}. Record them again "
            "with GradientFuser(pipe).record(source, alongside=[all other sources]), on a model that has all of "
            "these layers."
        )
