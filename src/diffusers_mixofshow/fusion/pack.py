"""A fused pack: an ED-LoRA with several concepts and a record of its sources, which can be changed."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import torch

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.card import Samples
from diffusers_mixofshow.edlora.file import FILE_NAME, PLAIN_NAME
from diffusers_mixofshow.edlora.fusion_record import read_plain_record, record_of, write_plain_record
from diffusers_mixofshow.edlora.hub import download, is_repo_id
from diffusers_mixofshow.edlora.reading import read_metadata
from diffusers_mixofshow.errors import EDLoRANotFoundError, FusionError, MixOfShowError, suggest, warn
from diffusers_mixofshow.fusion.collection import Recording
from diffusers_mixofshow.fusion.gram import Device, Gram
from diffusers_mixofshow.fusion.pack_sources import (
    carry_all,
    find_replaced,
    find_source,
    leave_out_carried,
    list_places,
    read_record,
)
from diffusers_mixofshow.fusion.prompts import PromptSet
from diffusers_mixofshow.fusion.report import FusionReport
from diffusers_mixofshow.fusion.solving import (
    MEASURED,
    Settings,
    Solution,
    Statistics,
    check_recorded,
    sites_of,
    solve,
)
from diffusers_mixofshow.fusion.sources import (
    FusionInput,
    Source,
    gather,
    label_defects,
    mutual_defects,
    warn_of_copies,
)
from diffusers_mixofshow.fusion.store import StatisticsStore
from diffusers_mixofshow.fusion.team import Team
from diffusers_mixofshow.interop.lora_files import read_lora, write_lora


_OF_RECORDING = (*(field.name for field in fields(Recording)), "prior", "recording_s")
"""Entries of a report that tell how statistics were recorded, which stays as it was when a pack is changed."""


@dataclass(frozen=True, kw_only=True, repr=False)
class FusedPack(EDLoRA):
    """An ED-LoRA made by fusion: the fields of `EDLoRA`, and how they were computed.

    Args:
        sources: What it was fused from. They are not part of its file.
        settings: How its layers were solved.
        prior: Input to the weighted Gram matrix of prompts without concepts, whose outputs were kept; shape
            (in_features, in_features).
        dtype: Dtype of the updates in its file.
        device: Where `add`, `remove` and `reweight` solve layers.
    """

    sources: tuple[Source, ...] = ()
    settings: Settings = field(default_factory=Settings)
    prior: Mapping[str, Gram] = field(default_factory=dict)
    dtype: torch.dtype = torch.float16
    device: Device = "cpu"

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        merged: bool = False,
        samples: Samples | None = None,
        license: str | None = None,
        sources: bool = False,
        overwrite: bool = False,
    ) -> Path:
        """Write the pack, see `EDLoRA.save_pretrained`; without any concept, a plain LoRA file and its card.

        Args:
            folder: Created where it is missing.
            merged: Write a complete pipeline instead.
            samples: Prompt to the picture it drew, for the card's gallery.
            license: For the card.
            sources: Write the sources and their statistics as well, into ``folder/sources/<concepts>``, so that a copy
                of the pack can be changed anywhere: some 12 MB a concept for SD 1.5. Otherwise only sources from the
                Hub are found again.
            overwrite: Replace a pack that exists; one of the sources only with `sources`. Of the sources carried by
                the replaced pack, those of this pack are kept and the others are deleted.

        Returns:
            Path of the safetensors file.

        Raises:
            OverwriteError: If a file exists already, or a source would be lost.
            FusionError: If two sources would be written to the same folder; nothing is written then.
        """
        find_replaced(Path(folder), self._file_name, self.sources, merged=merged, carried=sources, overwrite=overwrite)
        if not self.concepts and merged:
            raise FusionError(
                "A pack without concepts is written as one plain LoRA; merged is for packs with concepts. Load it "
                "with load_lora_weights() and use fuse_lora() instead."
            )
        written = self if merged else replace(self, lora={k: one.cast(self.dtype) for k, one in self.lora.items()})
        pictures = written._read_samples(samples, merged=merged, license_id=license)
        if sources:
            carry_all(self.sources, Path(folder), self.base_model)
        # overwrite=True: the folder now holds the carried sources
        return super(FusedPack, written).save_pretrained(
            folder, merged=merged, samples=pictures, license=license, overwrite=True
        )

    @property
    def _file_name(self) -> str:
        return FILE_NAME if self.concepts else PLAIN_NAME

    def _stale(self, folder: Path, *, merged: bool = False) -> list[Path]:
        """Files of an earlier pack in a folder, except sources that this pack is fused from as well."""
        return leave_out_carried(super()._stale(folder, merged=merged), folder, self.sources)

    def _is_in(self, folder: Path, *, merged: bool) -> bool:
        """Whether a folder holds this pack; one without concepts is there as a plain LoRA."""
        if self.concepts:
            return super()._is_in(folder, merged=merged)
        try:
            there = read_plain_pack(folder)
        except MixOfShowError:  # broken
            return False
        return there is not None and there.digest == self.digest

    def _check(self) -> None:
        """See `EDLoRA._check`; a plain LoRA may be written with any updates."""
        if self.concepts:
            super()._check()

    def _write(self, path: Path) -> None:
        """Write the pack's file; of plain LoRAs alone one plain LoRA, named as diffusers expects it."""
        if self.concepts:
            super()._write(path)
        else:
            write_lora(path, self.lora, write_plain_record(self.training, self.base_model))

    def push_to_hub(self, repo_id: str | None = None, **options: Any) -> str:
        """Upload the pack, see `EDLoRA.push_to_hub`; without any concept, a plain LoRA.

        Args:
            repo_id: Required for a pack without concepts; otherwise derived from the concepts' names.
            options: Passed to `EDLoRA.push_to_hub`.

        Returns:
            The repository's URL.

        Raises:
            FusionError: If a pack without concepts is given no `repo_id`.
            HubError: If the Hub refuses or cannot be reached.
        """
        if not self.concepts:
            if repo_id is None:
                raise FusionError(
                    "A pack without concepts has no name; give push_to_hub a repo_id such as 'user/both'."
                )
            names = ", ".join(name for one in self.sources for name in one.prompts)
            options["commit_message"] = options.get("commit_message") or f"LoRA fused from {names}"
        return super().push_to_hub(repo_id, **options)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, subfolder: str | None = None, **hub: Any) -> Self:
        """Read a pack together with its sources, so that it can be changed.

        Args:
            source: A folder, file or Hub id, see `EDLoRA.from_pretrained`.
            subfolder: See `EDLoRA.from_pretrained`.
            hub: The other arguments of `EDLoRA.from_pretrained`; all but the revision serve to read sources from
                other repositories as well.

        Raises:
            FusionError: If it was not fused, or a source is neither carried nor unchanged on the Hub.
        """
        pack = cls._read(source, subfolder, **hub)
        settings, entries = read_record(FusionReport.of(pack).data)
        carrier = Path(source).parent if Path(source).is_file() else source
        parts = [subfolder] if subfolder else []
        found = []
        for entry, places in zip(entries, list_places([entry["concepts"] for entry in entries]), strict=True):
            inside = ["/".join([*parts, place]) for place in places]
            found.append(find_source(entry, carrier, *inside, **hub))
        return replace(pack, sources=tuple(found), settings=settings, dtype=_dtype_of(pack))

    @classmethod
    def _read(cls, source: str | os.PathLike[str], subfolder: str | None, **hub: Any) -> Self:
        """Read a pack without its sources, of ED-LoRAs or of plain LoRAs alone."""
        if plain := _plain_file(Path(source, subfolder or "")):
            return cls._of_plain(plain)
        try:
            return super().from_pretrained(source, subfolder=subfolder, **hub)
        except EDLoRANotFoundError:
            with suppress(EDLoRANotFoundError):
                if is_repo_id(source):
                    plain = _plain_file(download(str(source), PLAIN_NAME, subfolder=subfolder, **hub))
            if plain is None:
                raise
            return cls._of_plain(plain)

    @classmethod
    def _of_plain(cls, path: Path) -> Self:
        training, base_model = read_plain_record(read_metadata(path))
        lora = read_lora(path)
        pack = cls(concepts=(), embeddings={}, lora=lora, base_model=base_model, layers=(), training=training)
        return replace(pack, dtype=_dtype_of(pack))

    @property
    def report(self) -> FusionReport:
        """Settings and residuals of the fusion, layer by layer."""
        return FusionReport.of(self)

    def name_base(self, base_model: str) -> Self:
        """The pack with this base model, unless that is empty or the concepts name theirs."""
        is_told = bool(self.concepts and self.base_model)
        return self if is_told or not base_model else replace(self, base_model=base_model)

    def add(self, source: FusionInput, *, prompts: PromptSet | None = None) -> FusedPack:
        """Add a source; the result equals a new fusion of all sources.

        Args:
            source: An ED-LoRA with statistics, see `GradientFuser.record`; `FusionSource` gives it a weight.
            prompts: Recording prompts, for the report only.

        Raises:
            ConceptError: If its concept is in the pack already.
            FusionError: If statistics are missing, or the source does not fit.
        """
        gathered = gather([source], None, prompts=prompts, recorded=self.settings.method in MEASURED)
        (added,) = StatisticsStore().attach(gathered, [source])
        warn_of_copies((*self.sources, added))
        return fuse_again(self, (*self.sources, added))

    def remove(self, name: str) -> FusedPack:
        """Remove a source; the result equals a new fusion of the others.

        Args:
            name: Placeholder of a concept, e.g. ``<potter>``. A source with several concepts is removed as a whole.

        Raises:
            FusionError: If the name is not in the pack, is its only source, or statistics are missing.
        """
        leaving = self._source_of(name)
        if len(self.sources) == 1:
            raise FusionError(f"{name} is the only source of this pack. Add another source before removing it.")
        return fuse_again(self, tuple(source for source in self.sources if source is not leaving))

    def reweight(self, weights: Mapping[str, float]) -> FusedPack:
        """Change weights of sources; the result equals a new fusion with these weights.

        Args:
            weights: Placeholder to weight; other sources keep theirs.

        Raises:
            FusionError: If a name is not in the pack, a weight is not above 0, concepts of one source get different
                weights, or statistics are missing.
        """
        wrong = {name: weight for name, weight in weights.items() if not 0 < weight < float("inf")}
        if wrong:
            raise FusionError(f"Weights must be finite and above 0, got {wrong}.")
        new: dict[str, float] = {}
        for name, weight in weights.items():
            whole = self._source_of(name).name
            if new.setdefault(whole, weight) != weight:
                raise FusionError(f"{whole} is one source, which has one weight; got {new[whole]:g} and {weight:g}.")
        return fuse_again(self, tuple(replace(one, weight=new.get(one.name, one.weight)) for one in self.sources))

    def _source_of(self, name: str) -> Source:
        for source in self.sources:
            if name in (source.name, *source.prompts):
                return source
        known = ", ".join(source.name for source in self.sources) or "none, as it was read from a file"
        placeholders = [placeholder for source in self.sources for placeholder in source.prompts]
        guess = suggest("<" + name.strip("<>") + ">", placeholders)
        raise FusionError(f"{name} is not a source of this pack; its sources are {known}.{guess}")


def read_plain_pack(source: str | os.PathLike[str]) -> FusedPack | None:
    """Read a pack that was fused from plain LoRAs alone, without its sources; None for anything else.

    Args:
        source: Its folder or file.
    """
    path = _plain_file(source)
    return None if path is None else FusedPack._of_plain(path)


def fuse_again(pack: FusedPack, sources: tuple[Source, ...]) -> FusedPack:
    """Fuse changed sources with the settings of a pack, from their statistics alone.

    Raises:
        FusionError: If they do not fit each other, or statistics are missing.
    """
    record = pack.report.data
    if record.get("sequential") or (record.get("prior") and not pack.prior):
        raise FusionError(
            "This pack was fused in stages, or with a prior that its file does not hold. It cannot be changed from "
            "statistics; fuse all sources anew, or with GradientFuser(pipe, sequential=False)."
        )
    if defects := [*mutual_defects(sources), *label_defects(sources)]:
        raise FusionError("The pack cannot be changed in this way: " + "; ".join(defects))
    missing = [source.name for source in sources if source.statistics is None]
    if missing and pack.settings.method in MEASURED:
        raise FusionError(
            f"The pack can only be changed with statistics of every source, recorded with its own LoRA; "
            f"{len(missing)} have none ({', '.join(missing)}). Fuse with "
            "GradientFuser(pipe, sequential=False), or all sources anew."
        )
    told = {key: record[key] for key in _OF_RECORDING if key in record}
    changed = fuse_recorded(sources, pack.settings, {**told, "sequential": False}, pack.prior, device=pack.device)
    return replace(changed.name_base(pack.base_model), dtype=pack.dtype)


def fuse_recorded(
    sources: tuple[Source, ...],
    settings: Settings,
    record: Mapping[str, object],
    prior: Mapping[str, Gram] | None = None,
    *,
    device: Device = "cpu",
    pipe: object = None,
) -> FusedPack:
    """Fuse sources from their statistics, which methods outside `MEASURED` do not need.

    Args:
        sources: What to fuse.
        settings: How to solve; for this, `prior`, `device` and `pipe` see `solve`.
        record: Further entries of the report.
    """
    start, sites = time.perf_counter(), sites_of(sources)
    statistics = _statistics_of(sources)
    if statistics:
        check_recorded(sources, statistics, sites)
    solution = solve(sources, statistics, sites, settings, prior=prior, device=device, pipe=pipe)
    fused = pack_solution(sources, settings, solution, {**record, "solving_s": round(time.perf_counter() - start, 3)})
    return replace(fused, prior=prior or {}, device=device)


def pack_solution(
    sources: tuple[Source, ...], settings: Settings, solution: Solution, record: Mapping[str, object]
) -> FusedPack:
    """Make a pack of the fused layers, all concepts' embeddings and the report.

    Warns:
        MixOfShowWarning: If hardly anything of a concept is kept.
    """
    edloras = [source.edlora for source in sources]
    embeddings: dict[str, torch.Tensor] = {}
    for edlora in edloras:
        embeddings |= edlora.embeddings
    report = FusionReport.record(sources, settings, solution, record)
    for warning in FusionReport(report).warnings:
        warn(warning)
    return FusedPack(
        concepts=tuple(concept for edlora in edloras for concept in edlora.concepts),
        embeddings=embeddings,
        lora=solution.lora,
        base_model=_find_base(sources),
        layers=next((edlora.layers for edlora in edloras if edlora.layers), ()),
        training={"fusion": report},
        sources=sources,
        settings=settings,
    )


def _find_base(sources: Sequence[Source]) -> str:
    """The base model of fused sources: that of the concepts, else the one that plain LoRAs or their statistics name.

    Empty if none is named, or plain LoRAs name several, which may well be fused.
    """
    if of_concepts := [one.edlora.base_model for one in sources if one.edlora.concepts and one.edlora.base_model]:
        return of_concepts[0]
    named = {source.base_model for source in sources} - {""}
    return named.pop() if len(named) == 1 else ""


def _dtype_of(pack: FusedPack) -> torch.dtype:
    """Dtype of the updates of a pack that was read, so that it is saved again as it was."""
    return next((update.down.dtype for update in pack.lora.values()), pack.dtype)


def _plain_file(source: str | os.PathLike[str]) -> Path | None:
    """The file of a pack that was fused from plain LoRAs alone, from its folder or its own path; else None."""
    path = Path(source)
    if path.is_dir() and not (path / FILE_NAME).exists():
        path = path / PLAIN_NAME
    return path if path.is_file() and record_of(read_plain_record(read_metadata(path))[0]) else None


def _statistics_of(sources: Sequence[Source]) -> Statistics:
    """Statistics of the concepts of this process's sources; empty unless all sources of all processes have some."""
    team = Team.current()
    mine = {
        place: [source.statistics.concepts[placeholder] for placeholder in source.prompts]
        for place, source in team.share(sources).items()
        if source.statistics is not None and source.prompts.keys() <= source.statistics.concepts.keys()
    }
    recorded = team.all_gather(dict.fromkeys(mine, True))
    return [mine.get(place, []) for place in range(len(sources))] if len(recorded) == len(sources) else []
