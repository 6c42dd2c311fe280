"""Gradient fusion (arXiv:2305.18292, section 3.3.2): several ED-LoRAs in, one ED-LoRA that holds all of them out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.fusion.collection import FusablePipeline, Recording, TextTokens, collect
from diffusers_mixofshow.fusion.prompts import PromptSet
from diffusers_mixofshow.fusion.solvers import (
    Factors,
    at_most_full_rank,
    closed_form,
    factorise,
    relative_residual,
    weighted_average,
)
from diffusers_mixofshow.fusion.sources import EDLoRASource, Source, gather
from diffusers_mixofshow.fusion.statistics import ConceptStatistics, input_name, summed_gram


Method = Literal["closed-form", "average"]
Residuals = dict[str, dict[str, tuple[float, float]]]
"""Layer to source to relative residual under the weighted average and after fusion."""


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """Layers that are recorded and solved together; earlier stages are already fused when it is recorded."""

    sites: tuple[str, ...]
    recording: Recording


class GradientFuser:
    """Fuses tuned concepts without their photos, by least squares on what each layer sees.

    Every concept is sampled from prompts with its own LoRA; then each layer gets the low-rank update that keeps all
    concepts' outputs best. The result is exactly a LoRA, its rank the sum of the concepts' ranks.

    Args:
        pipe: A pipeline of the concepts' base model, such as `MixOfShowPipeline`; it leaves as it came.
        prompts: Recording prompts with ``<TOK>`` for the concept, for all concepts or by kind. They must span what
            users will ask for: contexts that they never show are not protected. Default: see `prompts`.
        steps: Denoising steps of DPM-Solver.
        guidance_scale: Guidance while recording; above 1 both halves are recorded.
        negative_prompt: Prompt of the unconditional half.
        seeds: Every prompt is sampled once with each of them.
        ridge: Weight of small updates against a perfect fit, as a fraction of the mean squared feature.
        sequential: Record the text keys and values on top of the fused text encoder, and the remaining layers on top
            of both, as the paper does. False records all layers with the concept's own LoRA at once; on Toyland it
            keeps less identity for the same time.
        text_tokens: Whether the text encoder's layers count padding.
        batch_size: Pictures sampled together.
        height: Height of the recorded pictures in pixels; the model's own by default.
        width: Width of the recorded pictures in pixels; the model's own by default.
    """

    def __init__(
        self,
        pipe: FusablePipeline,
        *,
        prompts: PromptSet | None = None,
        steps: int = 20,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        seeds: Sequence[int] = (0,),
        ridge: float = 1e-2,
        sequential: bool = True,
        text_tokens: TextTokens = "all",
        batch_size: int = 4,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        """Keep the settings; nothing is loaded or sampled yet."""
        if ridge < 0:
            raise FusionError(f"ridge must be 0 or more, got {ridge}. Usual values are 1e-3 to 1e-1.")
        self.pipe = pipe
        self.prompts = prompts
        self.ridge = ridge
        self.sequential = sequential
        self.recording = Recording(
            steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            seeds=tuple(seeds),
            batch_size=batch_size,
            text_tokens=text_tokens,
            height=height,
            width=width,
        )

    def fuse(
        self,
        sources: Sequence[EDLoRASource],
        method: Method = "closed-form",
        *,
        weights: Sequence[float] | None = None,
        scales: Sequence[float] | None = None,
    ) -> EDLoRA:
        """Fuse ED-LoRAs, single concepts or packs, into one pack.

        Args:
            sources: ED-LoRAs, or paths and Hub ids of them.
            method: ``closed-form`` is gradient fusion; ``average`` is equation 2, which records nothing.
            weights: Share of each source in the objective or the average; equal by default.
            scales: Factor on all updates of each source; 1 by default.

        Returns:
            One ED-LoRA with all concepts; ``training["fusion"]`` reports settings and residuals.

        Raises:
            FusionError: If the sources fit neither each other nor the model; lists everything that is wrong.
        """
        if method not in ("closed-form", "average"):
            raise FusionError(f"Unknown fusion method {method!r}; expected 'closed-form' or 'average'.")
        gathered = gather(sources, self.pipe.components, prompts=self.prompts, weights=weights, scales=scales)
        if method == "average":
            return _pack(gathered, _averaged(gathered), {"method": method, "sources": _provenance(gathered)})
        lora, residuals = self._closed_form(gathered)
        return _pack(gathered, lora, self._report(gathered, residuals))

    def _closed_form(self, sources: Sequence[Source]) -> tuple[dict[str, LowRank], Residuals]:
        lora: dict[str, LowRank] = {}
        residuals: Residuals = {}
        stages = _stages(_sites(sources), self.recording, sequential=self.sequential)
        with self.pipe.concepts_set_aside(), _progress_bars(sources, stages) as advance:
            for stage in stages:
                statistics = [self._record(source, stage, lora, advance) for source in sources]
                for sites in _by_input(stage.sites):
                    solved, errors = _solve(sources, statistics, sites, self.ridge)
                    lora |= solved
                    residuals |= errors
        return lora, residuals

    def _record(
        self, source: Source, stage: _Stage, fused: Mapping[str, LowRank], advance: Callable[[str, int], None]
    ) -> list[ConceptStatistics]:
        """Statistics of each of the source's concepts, with its own LoRA save where layers are fused already."""
        edlora = replace(source.edlora, lora={**source.edlora.lora, **fused})
        return [
            collect(
                self.pipe,
                edlora,
                prompts,
                stage.sites,
                stage.recording,
                advance=lambda pictures, placeholder=placeholder: advance(placeholder, pictures),  # type: ignore[misc]
            )
            for placeholder, prompts in source.prompts.items()
        ]

    def _report(self, sources: Sequence[Source], residuals: Residuals) -> dict[str, object]:
        recording = self.recording
        return {
            "method": "closed-form",
            "ridge": self.ridge,
            "sequential": self.sequential,
            "steps": recording.steps,
            "guidance_scale": recording.guidance_scale,
            "negative_prompt": recording.negative_prompt,
            "seeds": list(recording.seeds),
            "text_tokens": recording.text_tokens,
            "prompts": {name: list(prompts) for source in sources for name, prompts in source.prompts.items()},
            "sources": _provenance(sources),
            "residuals": _residual_report(sources, residuals),
        }


def _sites(sources: Sequence[Source]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(site for source in sources for site in source.edlora.lora))


def _stages(sites: Sequence[str], recording: Recording, *, sequential: bool) -> tuple[_Stage, ...]:
    """All layers at once; or text encoder, text keys and values, rest. Text does not change with the step."""
    if not sequential:
        return (_Stage(sites=tuple(sites), recording=recording),)
    text = tuple(site for site in sites if site.startswith("text_encoder"))
    keys_values = tuple(site for site in sites if input_name(site).endswith(".attn2.to_k+to_v"))
    rest = tuple(site for site in sites if site not in {*text, *keys_values})
    one_step = replace(recording, steps=1, seeds=recording.seeds[:1])
    stages = (
        _Stage(sites=text, recording=one_step),
        _Stage(sites=keys_values, recording=one_step),
        _Stage(sites=rest, recording=recording),
    )
    return tuple(stage for stage in stages if stage.sites)


def _by_input(sites: Sequence[str]) -> list[tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(input_name(site), []).append(site)
    return [tuple(group) for group in groups.values()]


def _solve(
    sources: Sequence[Source],
    statistics: Sequence[Sequence[ConceptStatistics]],
    sites: Sequence[str],
    ridge: float,
) -> tuple[dict[str, LowRank], Residuals]:
    """Fuse the layers that read one input; the Gram matrices are inverted once for all of them."""
    name = input_name(sites[0])
    grams = [summed_gram(concepts, name) for concepts in statistics]
    weighted = [source.weight * gram for source, gram in zip(sources, grams, strict=True)]
    inverse = factorise(weighted, ridge)
    lora, residuals = {}, {}
    for site in sites:
        updates = _updates(sources, site)
        fused = closed_form(updates, weighted, inverse)
        average = weighted_average(updates, [source.weight for source in sources])
        residuals[site] = {
            source.name: (relative_residual(average, own, gram), relative_residual(fused, own, gram))
            for source, own, gram in zip(sources, updates, grams, strict=True)
        }
        lora[site] = _low_rank(fused)
    return lora, residuals


def _averaged(sources: Sequence[Source]) -> dict[str, LowRank]:
    weights = [source.weight for source in sources]
    return {site: _low_rank(weighted_average(_updates(sources, site), weights)) for site in _sites(sources)}


def _updates(sources: Sequence[Source], site: str) -> list[Factors]:
    present = next(source.edlora.lora[site] for source in sources if site in source.edlora.lora)
    shape = (present.up.shape[0], present.down.shape[1])
    return [source.factors(site, shape) for source in sources]


def _low_rank(update: Factors) -> LowRank:
    update = at_most_full_rank(update)
    down, up = update.down.float().contiguous(), update.up.float().contiguous()
    return LowRank(down=down, up=up, alpha=float(len(down)))


def _pack(sources: Sequence[Source], lora: Mapping[str, LowRank], report: dict[str, object]) -> EDLoRA:
    edloras = [source.edlora for source in sources]
    embeddings: dict[str, torch.Tensor] = {}
    for edlora in edloras:
        embeddings |= edlora.embeddings
    return EDLoRA(
        concepts=tuple(concept for edlora in edloras for concept in edlora.concepts),
        embeddings=embeddings,
        lora=lora,
        base_model=edloras[0].base_model,
        layers=edloras[0].layers,
        training={"fusion": report},
    )


def _provenance(sources: Sequence[Source]) -> list[dict[str, object]]:
    return [
        {
            "concepts": list(source.prompts),
            "weight": source.weight,
            "scale": source.scale,
            "training": {key: value for key, value in source.edlora.training.items() if key != "fusion"},
        }
        for source in sources
    ]


def _residual_report(sources: Sequence[Source], residuals: Residuals) -> dict[str, object]:
    """Per layer and source, and the mean over layers; null where fusion changes a layer that a source leaves alone."""

    def rounded(pairs: Collection[tuple[float, float]]) -> dict[str, float | None]:
        means = [sum(values) / len(values) for values in zip(*pairs, strict=True)]
        average, fused = (None if value == float("inf") else round(value, 4) for value in means)
        return {"average": average, "fused": fused}

    return {
        "meaning": "|D X_i - dW_i X_i| / |dW_i X_i|: relative output error per source, weighted average and fused",
        "mean": {source.name: rounded([layer[source.name] for layer in residuals.values()]) for source in sources},
        "layers": {site: {name: rounded([pair]) for name, pair in layer.items()} for site, layer in residuals.items()},
    }


@contextmanager
def _progress_bars(sources: Sequence[Source], stages: Sequence[_Stage]) -> Iterator[Callable[[str, int], None]]:
    """One bar per concept, counting denoised pictures; silent where the output is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns)
    progress.disable = not progress.console.is_terminal
    tasks = {}
    for source in sources:
        for placeholder, prompts in source.prompts.items():
            total = len(prompts) * sum(stage.recording.steps * len(stage.recording.seeds) for stage in stages)
            tasks[placeholder] = progress.add_task(f"Recording {placeholder}", total=total)
    with progress:
        yield lambda placeholder, pictures: progress.advance(tasks[placeholder], pictures)
