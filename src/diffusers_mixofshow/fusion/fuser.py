"""Gradient fusion (arXiv:2305.18292, section 3.3.2) of several ED-LoRAs into one ED-LoRA with all their concepts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Unpack

from diffusers_mixofshow.base_models import name_of
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.families.layers import adapted_layers
from diffusers_mixofshow.fusion.borrowing import refuse_concepts, refuse_unfusable, set_aside
from diffusers_mixofshow.fusion.collection import FusablePipeline, Recording, collect
from diffusers_mixofshow.fusion.config import FusionConfig, FusionKeywords
from diffusers_mixofshow.fusion.gram import Gram, sum_grams
from diffusers_mixofshow.fusion.pack import FusedPack, fuse_recorded, pack_solution
from diffusers_mixofshow.fusion.prompts import prior_prompts
from diffusers_mixofshow.fusion.published import SourceStatistics
from diffusers_mixofshow.fusion.shelf import StageShelf, hash_base
from diffusers_mixofshow.fusion.size import warn_of_full_rank
from diffusers_mixofshow.fusion.solving import (
    MEASURED,
    Method,
    Settings,
    Solution,
    family_of_sources,
    sites_of,
    solve,
)
from diffusers_mixofshow.fusion.sources import FusionInput, Source, gather
from diffusers_mixofshow.fusion.statistics import ConceptStatistics, GramStatistics
from diffusers_mixofshow.fusion.store import StatisticsStore
from diffusers_mixofshow.fusion.team import Team
from diffusers_mixofshow.progress import progress


Sample = Callable[[EDLoRA, Mapping[str, Sequence[str]]], dict[str, ConceptStatistics]]
"""Samples concepts with a LoRA from prompts by placeholder; returns the statistics of their layer inputs."""


class GradientFuser:
    """Fuses tuned concepts without their photos, by least squares on the inputs of each layer.

    Every concept is sampled from prompts with its own LoRA; then each layer gets the low-rank update that reproduces
    all concepts' outputs best. The result is a LoRA whose rank is the sum of the concepts' ranks.

    Args:
        pipe: A `MixOfShowPipeline` of the concepts' base model; if all sources are plain LoRAs, any diffusers
            pipeline of a known family. It is left unchanged. Not needed if every source has statistics, or for
            methods that use none.
        config: All settings; by default those of `FusionConfig`.
        keywords: Fields of `FusionConfig`; they override the config.
    """

    def __init__(
        self,
        pipe: FusablePipeline | None = None,
        config: FusionConfig | None = None,
        **keywords: Unpack[FusionKeywords],
    ) -> None:
        """Keep the settings; nothing is loaded or sampled yet."""
        refuse_unfusable(pipe)
        self.pipe = pipe
        self.config = replace(FusionConfig() if config is None else config, **keywords).resolve(pipe)
        recording = self.config.recording
        self.recording = recording if pipe is None else recording.resolve(pipe)
        self._store = StatisticsStore(
            folder=None if self.config.statistics is None else Path(self.config.statistics),
            max_bytes=self.config.statistics_bytes,
            recording=None if pipe is None else self.recording,
            usual=None if pipe is None else Recording().resolve(pipe),
        )

    def fuse(
        self,
        sources: Sequence[FusionInput],
        method: Method = "closed-form",
        *,
        weights: Sequence[float] | None = None,
        scales: Sequence[float] | None = None,
    ) -> FusedPack:
        """Fuse ED-LoRAs, single concepts or packs, into one pack.

        Args:
            sources: ED-LoRAs, or paths and Hub ids of them, including other programs' files. `FusionSource` adds
                settings to one, `LoRASource` trigger words to a plain LoRA.
            method: ``closed-form`` is gradient fusion, ``lbfgs`` the paper's solver for it, ``ssr`` SSR-Merge, which
                is restricted to the row space of the LoRAs. The others use the updates alone: ``average`` is equation
                2; ``sum``, ``ties``, ``dare`` and ``svd`` are common merges.
            weights: Share of each source in the objective or the average; equal by default.
            scales: Factor on all updates of each source; 1 by default.

        Returns:
            One ED-LoRA with all concepts; its `report` tells settings and residuals.

        Raises:
            ConceptError: If concepts of several sources share names.
            FusionError: If the sources do not fit each other or the model; lists every defect.
        """
        settings = replace(self.config.settings, method=method)
        recorded = settings.method in MEASURED
        gathered = self._gather(
            sources, weights, scales, with_statistics=not self.config.sequential, recorded=recorded
        )
        warn_of_full_rank([source.edlora.lora for source in gathered], settings, self.config.dtype)
        if not recorded:
            fused = fuse_recorded(gathered, settings, {}, device=self.config.device, pipe=self.pipe)
        elif self.config.sequential:
            fused = self._fuse_in_stages(gathered, settings)
        else:
            fused = self._fuse_with_own_statistics(gathered, settings)
        return replace(fused.name_base(name_of(self.pipe)), dtype=self.config.dtype)

    def record(self, source: FusionInput, *, alongside: Sequence[FusionInput] = ()) -> SourceStatistics:
        """Sample the concepts of one source with its own LoRA, and keep the statistics for later fusions.

        Done before publishing an ED-LoRA: the file lies beside the LoRA's, and `GradientFuser().fuse` then needs
        neither a model nor a GPU. Statistics recorded earlier with the same settings are reused.

        Args:
            source: An ED-LoRA, or a path or Hub id of one.
            alongside: Sources or packs that it will be fused with. Layers that only they change, such as the
                feed-forward layers of plain LoRAs, are recorded as well.

        Returns:
            The statistics; `SourceStatistics.save` writes a copy elsewhere.
        """
        gathered = self._gather([source], with_statistics=True)
        others = [one for other in alongside for one in self._gather([other], with_statistics=False)]
        (recorded,) = self._record_missing(gathered, sites_of([*gathered, *others]), publishing=True)
        if recorded.statistics is None:
            raise RuntimeError("Recording left no statistics.")
        return recorded.statistics

    def _gather(
        self,
        given: Sequence[FusionInput],
        weights: Sequence[float] | None = None,
        scales: Sequence[float] | None = None,
        *,
        with_statistics: bool,
        recorded: bool = True,
    ) -> tuple[Source, ...]:
        components = None if self.pipe is None else self.pipe.components
        prompts = self.config.prompts
        sources = gather(given, components, prompts=prompts, weights=weights, scales=scales, recorded=recorded)
        if self.pipe is not None:
            refuse_concepts(self.pipe, (source.edlora for source in sources))
        return self._store.attach(sources, given) if with_statistics else sources

    def _fuse_with_own_statistics(self, sources: tuple[Source, ...], settings: Settings) -> FusedPack:
        """Record all layers of each concept at once, with its own LoRA, and solve them."""
        start, sites = time.perf_counter(), sites_of(sources)
        recorded = self._record_missing(sources, sites)
        prior = self._record_prior(recorded, sites, self.recording)
        record = self._describe_recording(since=start)
        return fuse_recorded(recorded, settings, record, prior, device=self.config.device, pipe=self.pipe)

    def _fuse_in_stages(self, sources: tuple[Source, ...], settings: Settings) -> FusedPack:
        """The paper's order: each stage is recorded on a model with the fused layers of the stages before."""
        start, solution, mine = time.perf_counter(), Solution(), Team.current().share(sources)
        stages, hold_out = _stages(sources, self.recording), settings.ridge == "auto"
        told_sources = [source.edlora.digest for source in sources]
        fusion = {**asdict(settings), "base": hash_base(self._borrow()), "sources": told_sources}
        with StageShelf(fusion) as shelf:
            for number, (sites, recording) in enumerate(stages, 1):
                of_all = f", stage {number} of {len(stages)}"
                statistics: list[Sequence[GramStatistics]] = [() for _ in sources]
                with self._sampling(f"Recording{of_all}", mine.values(), sites, recording, hold_out) as sample:
                    for place, source in mine.items():
                        edlora = replace(source.edlora, lora={**source.edlora.lora, **solution.lora})
                        told = {**recording.as_json(source.prompts), "sites": list(sites), "hold_out": hold_out}
                        # In files: one source's statistics at most are in memory, and an interrupted fusion continues.
                        shelved = shelf.load_or_record(
                            self._store.writable_folder(source), edlora, told, partial(sample, edlora, source.prompts)
                        )
                        statistics[place] = [shelved.concepts[placeholder] for placeholder in source.prompts]
                solved = solve(
                    sources,
                    statistics,
                    sites,
                    settings,
                    prior=self._record_prior(sources, sites, recording),
                    device=self.config.device,
                    description=f"Solving{of_all}",
                    pipe=self.pipe,
                )
                solution.add(solved)
            shelf.clear()
        fused = pack_solution(sources, settings, solution, self._describe_recording(since=start))
        return replace(fused, device=self.config.device)

    def _record_missing(
        self, sources: tuple[Source, ...], sites: Sequence[str], *, publishing: bool = False
    ) -> tuple[Source, ...]:
        """Record missing statistics, one source at a time; each is saved before the next is recorded."""
        team = Team.current()
        # All processes agree on the list first: a file that one has just written may not be visible to others yet.
        lacking = team.all_gather(
            {source.name: True for source in sources if not self._store.has_usable(source, sites)}
        )
        missing = [source for source in sources if source.name in lacking]
        if not missing:
            return sources
        if self.pipe is None:
            lacks = "; ".join(defect for source in missing for defect in source.misfits)
            raise FusionError(
                f"Without a pipeline every source must bring statistics: {lacks}. Record them with "
                "GradientFuser(pipe).record(source), or give GradientFuser a pipeline of the base model."
            )
        recorded = {}
        mine = [source for source in team.share(sources).values() if source.name in lacking]
        every = tuple(dict.fromkeys([*adapted_layers(self.pipe.components), *sites]))  # so that others can reuse them
        with self._sampling("Recording", mine, every, self.recording, hold_out=True) as sample:
            for source in mine:
                place = self._store.choose_place(source, sites, publishing=publishing)
                statistics = SourceStatistics(
                    digest=source.edlora.digest,
                    base_model=source.edlora.base_model or name_of(self.pipe),
                    recording=self.recording.as_json(source.prompts),
                    concepts=sample(source.edlora, source.prompts),
                )
                recorded[source.name] = self._store.put(source, statistics, place)
        team.all_gather(dict.fromkeys(recorded, True))  # the others' files are written now
        return tuple(recorded.get(source.name) or self._store.read_again(source, sites) for source in sources)

    @contextmanager
    def _sampling(
        self, description: str, sources: Iterable[Source], sites: Sequence[str], recording: Recording, hold_out: bool
    ) -> Iterator[Sample]:
        """Yield a function that records concepts; progress of all sources is shown in steps of each picture."""
        pipe, count = self._borrow(), sum(len(texts) for source in sources for texts in source.prompts.values())
        with (
            set_aside(pipe),
            progress(description, count * recording.steps * len(recording.seeds), pipe=pipe) as bar,
        ):

            def sample(edlora: EDLoRA, prompts: Mapping[str, Sequence[str]]) -> dict[str, ConceptStatistics]:
                return {
                    placeholder: collect(pipe, edlora, texts, sites, recording, bar.update, hold_out=hold_out)
                    for placeholder, texts in prompts.items()
                }

            yield sample

    def _record_prior(self, sources: Sequence[Source], sites: Sequence[str], recording: Recording) -> dict[str, Gram]:
        """Input to the Gram matrix of the base on prompts without concepts, multiplied by the prior's weight."""
        weight = self.config.prior
        if weight == 0:
            return {}
        concepts = [concept for source in sources for concept in source.edlora.concepts]
        pipe, prompts = self._borrow(), prior_prompts(concepts, self.config.prior_prompts)
        steps = len(prompts) * recording.steps * len(recording.seeds)
        with set_aside(pipe), progress("Recording the base", steps, pipe=pipe) as bar:
            statistics = collect(pipe, None, prompts, sites, recording, bar.update)
        return {name: sum_grams([(statistics.gram(name), weight)]) for name in statistics.inputs}

    def _borrow(self) -> FusablePipeline:
        if self.pipe is None:
            raise FusionError("This needs a pipeline; give GradientFuser one of the concepts' base model.")
        return self.pipe

    def _describe_recording(self, *, since: float) -> dict[str, object]:
        """Recording settings and time for the report."""
        told: dict[str, object] = {"sequential": self.config.sequential}
        if self.pipe is not None:
            told = {**self.recording.as_json(), **told, "prior": self.config.prior}
        return told | {"recording_s": round(time.perf_counter() - since, 3)}


def _stages(sources: Sequence[Source], recording: Recording) -> list[tuple[tuple[str, ...], Recording]]:
    """Layers that are recorded and solved together, and how; the layers of earlier stages are fused by then.

    Inputs that depend on the text alone need one denoising step.
    """
    family, sites = family_of_sources(sources), sites_of(sources)
    one_step = replace(recording, steps=1, seeds=recording.seeds[:1])
    members = {stage: tuple(site for site in sites if family.stage_of(site) is stage) for stage in family.stages}
    return [(own, one_step if stage.text_alone else recording) for stage, own in members.items() if own]
