"""Gradient fusion (arXiv:2305.18292, section 3.3.2): several ED-LoRAs in, one ED-LoRA that holds all of them out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from diffusers_mixofshow.base_models import name_of
from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.edlora.defects import listed
from diffusers_mixofshow.errors import FusionError, warn
from diffusers_mixofshow.families import Family, family_of_sites
from diffusers_mixofshow.families.layers import adapted_layers
from diffusers_mixofshow.fusion.borrowing import refuse_concepts, refuse_unfusable, set_aside
from diffusers_mixofshow.fusion.collection import FusablePipeline, Recording, TextTokens, collect, differences
from diffusers_mixofshow.fusion.compression import GramFactor
from diffusers_mixofshow.fusion.pack import FusedPack, fuse_recorded, joined_residuals, packed
from diffusers_mixofshow.fusion.prompts import PromptSet, prior_prompts
from diffusers_mixofshow.fusion.published import MaxBytes, SourceStatistics, statistics_path
from diffusers_mixofshow.fusion.shelf import StageShelf
from diffusers_mixofshow.fusion.solving import (
    MEASURED,
    Device,
    Gram,
    Method,
    Ridge,
    Settings,
    Solution,
    check_device,
    family_of_sources,
    sites_of,
    solve_input,
)
from diffusers_mixofshow.fusion.sources import EDLoRASource, Source, gather, statistics_in
from diffusers_mixofshow.fusion.statistics import GramStatistics
from diffusers_mixofshow.fusion.team import Team
from diffusers_mixofshow.progress import progress


Advance = Callable[[int], None]

_RIDGE_IN_STAGES, _RIDGE_OF_OWN_FEATURES = 1e-3, 0.03
"""A fused model does not see quite what each concept's own model saw; a larger ridge keeps it from relying on that."""


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
        pipe: A pipeline of the concepts' base model, a `MixOfShowPipeline`; it leaves as it came. Not needed
            where every source brings statistics, or for methods that ask for none.
        prompts: Recording prompts with ``<TOK>`` for the concept, for all concepts or by kind. They must span what
            users will ask for: contexts that they never show are not protected. Default: see `prompts`.
        steps: Denoising steps of DPM-Solver.
        guidance_scale: Guidance while recording; above 1 both halves are recorded. Default: 7.5, on Toyland 3.
        negative_prompt: Prompt of the unconditional half.
        seeds: Every prompt is sampled once with each of them.
        ridge: Weight of small updates against a perfect fit, as a fraction of the mean squared feature. ``auto``
            keeps every fourth prompt apart while recording and picks the ridge of every layer by it. Default: what
            Toyland measured best, 1e-3 in stages and 0.03 with each concept's own model.
        prior: Weight of keeping the base's outputs on prompts without any concept, relative to all concepts together;
            0 records none. Prompts without concepts change less then, and concepts are kept less.
        prior_prompts: Those prompts; the concepts' class words are added. Default: see `prompts`.
        max_rank: Fused updates of a higher rank are cut down to it; the report tells what that loses.
        sequential: Record the text keys and values on top of the fused text encoder, and the remaining layers on top
            of both, as the paper does. False records all layers with the concept's own LoRA at once, so that
            statistics do not depend on what else is fused: they are taken from beside the sources where they lie, and
            kept there where they do not. Default: True with
            a pipeline.
        statistics: Folder in which statistics are kept, instead of beside the sources.
        statistics_bytes: Size of a concept's kept statistics; None keeps them in full, some 400 MB for SD 1.5.
            ``auto`` is 10 MB, and more for bases that are wider than SD 1.5.
        text_tokens: What the text encoder's layers count: ``all`` positions, the ``unpadded`` ones, or of these the
            ``concept`` tokens and the end token.
        batch_size: Pictures sampled together.
        device: Where layers are solved, in float64; such as ``cuda``. The fused layers are on the CPU.
        dtype: In which the pack's file holds the fused layers.
        height: Height of the recorded pictures in pixels; the model's own by default.
        width: Width of the recorded pictures in pixels; the model's own by default.
    """

    def __init__(
        self,
        pipe: FusablePipeline | None = None,
        *,
        prompts: PromptSet | None = None,
        steps: int = 20,
        guidance_scale: float | None = None,
        negative_prompt: str | None = "",
        seeds: Sequence[int] = (0,),
        ridge: Ridge | None = None,
        prior: float = 0.0,
        prior_prompts: Sequence[str] | None = None,
        max_rank: int | None = None,
        sequential: bool | None = None,
        statistics: str | os.PathLike[str] | None = None,
        statistics_bytes: MaxBytes = "auto",
        text_tokens: TextTokens = "all",
        batch_size: int = 4,
        device: Device = "cpu",
        dtype: torch.dtype = torch.float16,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        """Keep the settings; nothing is loaded or sampled yet."""
        refuse_unfusable(pipe)
        if sequential and pipe is None:
            raise FusionError("sequential=True samples with a model; give GradientFuser a pipeline.")
        if not prior >= 0 or prior == float("inf") or (prior > 0 and pipe is None):
            raise FusionError(f"prior must be 0 or more, and above 0 it needs a pipeline to sample; got {prior}.")
        check_device(device)
        self.device, self.dtype = device, dtype
        self.pipe, self.prompts = pipe, prompts
        self.prior, self.prior_prompts = prior, prior_prompts
        self.sequential = pipe is not None if sequential is None else sequential
        self.statistics = None if statistics is None else Path(statistics)
        self.statistics_bytes = statistics_bytes
        usual = _RIDGE_IN_STAGES if self.sequential else _RIDGE_OF_OWN_FEATURES
        self.settings = Settings(ridge=usual if ridge is None else ridge, max_rank=max_rank)
        recording = Recording(
            steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            seeds=tuple(seeds),
            batch_size=batch_size,
            text_tokens=text_tokens,
            height=height,
            width=width,
        )
        self.recording = recording if pipe is None else recording.resolved(pipe)

    def fuse(
        self,
        sources: Sequence[EDLoRASource],
        method: Method = "closed-form",
        *,
        weights: Sequence[float] | None = None,
        scales: Sequence[float] | None = None,
    ) -> FusedPack:
        """Fuse ED-LoRAs, single concepts or packs, into one pack.

        Args:
            sources: ED-LoRAs, or paths and Hub ids of them, of other programs' files, too; `FusionSource` gives one
                settings of its own, and `LoRASource` a plain LoRA its trigger words.
            method: ``closed-form`` is gradient fusion, ``lbfgs`` the paper's solver for it. The others see only the
                updates: ``average`` is equation 2, ``sum``, ``ties``, ``dare`` and ``svd`` are merges of the field.
            weights: Share of each source in the objective or the average; equal by default.
            scales: Factor on all updates of each source; 1 by default.

        Returns:
            One ED-LoRA with all concepts; its `report` tells settings and residuals.

        Raises:
            ConceptError: If concepts of several sources share names.
            FusionError: If the sources fit neither each other nor the model; lists everything that is wrong.
        """
        fused = self._fused(sources, replace(self.settings, method=method), weights, scales)
        unsaid = bool(fused.concepts) and not fused.base_model  # as other programs' files leave it
        return replace(fused, dtype=self.dtype, base_model=name_of(self.pipe) if unsaid else fused.base_model)

    def _fused(
        self,
        sources: Sequence[EDLoRASource],
        settings: Settings,
        weights: Sequence[float] | None,
        scales: Sequence[float] | None,
    ) -> FusedPack:
        gathered = self._gather(sources, weights, scales)
        if settings.method not in MEASURED:
            return fuse_recorded(gathered, settings, {}, device=self.device, pipe=self.pipe)
        if self.sequential:
            return self._fuse_in_stages(gathered, settings)
        start = time.perf_counter()
        recorded = self._with_statistics(gathered, sites_of(gathered))
        prior = self._prior(recorded, sites_of(recorded), self.recording)
        record = self._record(sequential=False, since=start)
        return fuse_recorded(recorded, settings, record, prior, device=self.device, pipe=self.pipe)

    def record(self, source: EDLoRASource, *, alongside: Sequence[EDLoRASource] = ()) -> SourceStatistics:
        """Sample the concepts of one source with its own LoRA, and keep the statistics, for whoever fuses it.

        A client does this before publishing: the file lies beside the LoRA's, and `GradientFuser().fuse` needs
        neither a model nor a GPU then. What was recorded before with the same settings is taken as it is.

        Args:
            source: An ED-LoRA, or a path or Hub id of one.
            alongside: Sources or packs that it is to be fused with. Layers that they change and an ED-LoRA does not,
                such as feed-forward layers of plain LoRAs, are recorded as well.

        Returns:
            The statistics; `SourceStatistics.save` writes them elsewhere.
        """
        gathered = self._gather([source], None, None, with_statistics=True)
        others = [self._gather([other], None, None, with_statistics=False) for other in alongside]
        sites = sites_of([*gathered, *(other for several in others for other in several)])
        (recorded,) = self._with_statistics(gathered, sites, publishing=True)
        if recorded.statistics is None:
            raise RuntimeError("Recording left no statistics.")
        return recorded.statistics

    def _gather(
        self,
        sources: Sequence[EDLoRASource],
        weights: Sequence[float] | None,
        scales: Sequence[float] | None,
        *,
        with_statistics: bool | None = None,
    ) -> tuple[Source, ...]:
        gathered = gather(
            sources,
            None if self.pipe is None else self.pipe.components,
            prompts=self.prompts,
            weights=weights,
            scales=scales,
            with_statistics=not self.sequential if with_statistics is None else with_statistics,
        )
        if self.pipe is not None:
            refuse_concepts(self.pipe, (source.edlora for source in gathered))
        return tuple(self._from_folder(source) for source in gathered)

    def _from_folder(self, source: Source) -> Source:
        """The source with what the folder of statistics has of it, unless it brings some that serve."""
        path = self._place(source)
        if self.statistics is None or path is None or not path.exists() or self._serves(source, ()):
            return source
        return replace(source, statistics=statistics_in(path, recorded_again=self.pipe is not None))

    def _with_statistics(
        self, sources: tuple[Source, ...], sites: Sequence[str], *, publishing: bool = False
    ) -> tuple[Source, ...]:
        """Record what is missing, one source at a time; each is kept before the next one is begun."""
        team = Team.present()
        lacking = {source.name: True for source in sources if not self._serves(source, sites)}
        # Agreed on before anybody records, as others' files may be there for one process and not yet for another.
        lacking = team.joined(lacking)
        missing = [source for source in sources if source.name in lacking]
        if missing and self.pipe is None:
            said = [
                *(f"{source.name} has none" for source in missing if source.statistics is None),
                *(defect for source in missing if source.statistics for defect in source.misfits(source.statistics)),
            ]
            raise FusionError(
                f"Without a pipeline every source must bring statistics: {'; '.join(said)}. Record them with "
                "GradientFuser(pipe).record(source), or give GradientFuser a pipeline of the base model."
            )
        if not missing:
            return sources
        recorded = {}
        mine = [source for source in team.share(sources).values() if source.name in lacking]
        with set_aside(self._borrowed()), self._progress("Recording", mine, self.recording) as advance:
            for source in mine:
                place = None if self._stays(source, publishing) else self._place(source)
                self._tell_why_again(source, sites, place)
                recorded[source.name] = self._kept(source, self._own_statistics(source, sites, advance), place)
        team.joined(dict.fromkeys(recorded, True))  # the others' files are written now
        return tuple(recorded.get(source.name) or self._read_again(source, sites) for source in sources)

    def _stays(self, source: Source, publishing: bool) -> bool:
        """Whether sound statistics beside the source, though of other settings, are somebody's to keep."""
        return not publishing and self.statistics is None and source.statistics is not None

    def _tell_why_again(self, source: Source, sites: Sequence[str], place: Path | None) -> None:
        if source.statistics is None:
            return
        why = "; ".join(self._misfits(source, source.statistics, sites))
        fate = ""
        if place is None and source.statistics.file is not None:
            fate = f" for this fusion alone ({source.statistics.file} stays; GradientFuser.record replaces it)"
        elif place is not None and place.exists():
            fate = f", in place of what is in {place}"
        warn(f"Statistics are recorded again{fate}: {why}.")

    def _read_again(self, source: Source, sites: Sequence[str]) -> Source:
        """A source with the statistics that another process may have written just now."""
        path = self._place(source)
        if self._serves(source, sites) or path is None or not path.exists():
            return source
        return replace(source, statistics=SourceStatistics.load(path))

    def _serves(self, source: Source, sites: Sequence[str]) -> bool:
        """Whether a source has statistics that can be used."""
        return source.statistics is not None and not self._misfits(source, source.statistics, sites)

    def _misfits(self, source: Source, statistics: SourceStatistics, sites: Sequence[str]) -> list[str]:
        """Why statistics are not the source's; with a pipeline, also why not of all layers and settings asked for."""
        misfits = source.misfits(statistics)
        if misfits or self.pipe is None:
            return misfits
        inputs = family_of_sites(sites).by_input(sites).keys()
        lacking = sorted(set().union(*(inputs - set(concept.inputs) for concept in statistics.concepts.values())))
        if lacking:
            misfits.append(f"the statistics given with {source.name} lack layers that are fused: {listed(lacking)}")
        own = Recording().resolved(self.pipe).as_json()
        if differing := differences(statistics.recording, self._recording_of(source), own):
            misfits.append(f"the statistics given with {source.name} were recorded with {', '.join(differing)}")
        return misfits

    def _own_statistics(self, source: Source, wanted: Sequence[str], advance: Advance) -> SourceStatistics:
        """Statistics of every layer that an ED-LoRA may adapt, and of those wanted, with the source's own LoRA."""
        pipe = self._borrowed()
        sites = tuple(dict.fromkeys([*adapted_layers(pipe.components), *wanted]))
        concepts = {
            placeholder: collect(pipe, source.edlora, prompts, sites, self.recording, advance, hold_out=True)
            for placeholder, prompts in source.prompts.items()
        }
        return SourceStatistics(
            digest=source.edlora.digest,
            base_model=source.edlora.base_model,
            recording=self._recording_of(source),
            concepts=concepts,
        )

    def _kept(self, source: Source, statistics: SourceStatistics, place: Path | None) -> Source:
        """Write statistics to their place and take them from there; where there is none, they stay in memory."""
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            statistics = SourceStatistics.load(statistics.save(place, max_bytes=self.statistics_bytes, overwrite=True))
        return replace(source, statistics=statistics)

    def _place(self, source: Source) -> Path | None:
        """The file in which a source's statistics are kept; None where there is no room for one."""
        if self.statistics is not None:
            return self.statistics / f"{source.edlora.digest[:16]}.statistics.safetensors"
        return None if source.home is None or self._folder(source) is None else statistics_path(source.home)

    def _folder(self, source: Source) -> Path | None:
        """The folder in which files of a source may be kept."""
        if self.statistics is not None:
            return self.statistics
        return None if source.home is None or not os.access(source.home.parent, os.W_OK) else source.home.parent

    def _recording_of(self, source: Source) -> dict[str, object]:
        prompts = {placeholder: list(prompts) for placeholder, prompts in source.prompts.items()}
        return {**self.recording.as_json(), "prompts": prompts}

    def _fuse_in_stages(self, sources: tuple[Source, ...], settings: Settings) -> FusedPack:
        """The paper's order: what is solved in one stage is in the model when the next one is recorded."""
        start, solution, team = time.perf_counter(), Solution(), Team.present()
        family = family_of_sources(sources)
        stages = _stages(family, sites_of(sources), self.recording)
        mine = team.share(sources)
        with (
            set_aside(self._borrowed()),
            StageShelf({**asdict(settings), "sources": [source.edlora.digest for source in sources]}) as shelf,
        ):
            for number, stage in enumerate(stages, 1):
                of_all = f", stage {number} of {len(stages)}"
                with self._progress(f"Recording{of_all}", mine.values(), stage.recording) as advance:
                    statistics = [
                        self._staged(source, stage, solution.lora, advance, shelf, hold_out=settings.ridge == "auto")
                        if place in mine
                        else []
                        for place, source in enumerate(sources)
                    ]
                prior = self._prior(sources, stage.sites, stage.recording)
                groups = family.by_input(stage.sites)
                with progress(f"Solving{of_all}", len(groups), pipe=self.pipe) as bar:
                    for name, group in groups.items():
                        gram = prior.get(name)
                        solution.add(
                            solve_input(family, sources, statistics, group, settings, gram, team, self.device)
                        )
                        bar.update()
            shelf.clear()
        solution.residuals = joined_residuals(solution, team)
        pack = packed(sources, settings, solution, self._record(sequential=True, since=start))
        return replace(pack, device=self.device)

    def _staged(
        self,
        source: Source,
        stage: _Stage,
        fused: Mapping[str, LowRank],
        advance: Advance,
        shelf: StageShelf,
        *,
        hold_out: bool,
    ) -> list[GramStatistics]:
        """Statistics of each of the source's concepts, with its own LoRA save where layers are fused already.

        They lie on the shelf until the fusion is done: no more than one source's are in memory, and an interrupted
        fusion takes up those that it had recorded.
        """
        edlora = replace(source.edlora, lora={**source.edlora.lora, **fused})
        recording = {**stage.recording.as_json(), "prompts": {k: list(v) for k, v in source.prompts.items()}}
        recording |= {"sites": list(stage.sites), "hold_out": hold_out}

        def collected() -> dict[str, GramStatistics]:
            return {
                placeholder: collect(
                    self._borrowed(),
                    edlora,
                    prompts,
                    stage.sites,
                    stage.recording,
                    advance,
                    hold_out=hold_out,
                )
                for placeholder, prompts in source.prompts.items()
            }

        shelved = shelf.taken_or_put(self._folder(source), edlora, recording, collected)
        return [shelved.concepts[placeholder] for placeholder in source.prompts]

    def _prior(self, sources: Sequence[Source], sites: Sequence[str], recording: Recording) -> dict[str, Gram]:
        """Gram matrices of the base on prompts without concepts, by input, the prior's weight in them."""
        if self.prior == 0:
            return {}
        concepts = [concept for source in sources for concept in source.edlora.concepts]
        pipe, prompts = self._borrowed(), prior_prompts(concepts, self.prior_prompts)
        steps = len(prompts) * recording.steps * len(recording.seeds)
        with set_aside(pipe), progress("Recording the base", steps, pipe=pipe) as bar:
            statistics = collect(pipe, None, prompts, sites, recording, bar.update)
        factors = {name: statistics.factor(name) for name in statistics.inputs}
        return {
            name: self.prior * statistics.gram(name) if factor is None else GramFactor.summed([factor], [self.prior])
            for name, factor in factors.items()
        }

    @contextmanager
    def _progress(self, description: str, sources: Iterable[Source], recording: Recording) -> Iterator[Advance]:
        """Count denoising steps of pictures while sources are recorded."""
        prompts = sum(len(texts) for source in sources for texts in source.prompts.values())
        with progress(description, prompts * recording.steps * len(recording.seeds), pipe=self.pipe) as bar:
            yield bar.update

    def _borrowed(self) -> FusablePipeline:
        if self.pipe is None:
            raise FusionError("This needs a pipeline; give GradientFuser one of the concepts' base model.")
        return self.pipe

    def _record(self, *, sequential: bool, since: float) -> dict[str, object]:
        """What the report says about recording."""
        record = {**self.recording.as_json(), "sequential": sequential, "prior": self.prior}
        if self.pipe is None:
            record = {"sequential": sequential}
        record["recording_s"] = round(time.perf_counter() - since, 3)
        return record


def _stages(family: Family, sites: Sequence[str], recording: Recording) -> tuple[_Stage, ...]:
    """The family's stages that have sites. What sees the text alone does not change with the step."""
    one_step = replace(recording, steps=1, seeds=recording.seeds[:1])
    members: dict[str, list[str]] = {stage.name: [] for stage in family.stages}
    for site in sites:
        members[family.stage_of(site).name].append(site)
    return tuple(
        _Stage(sites=tuple(members[stage.name]), recording=one_step if stage.text_alone else recording)
        for stage in family.stages
        if members[stage.name]
    )
