"""Find and keep statistics of sources: given with a source, in a folder of their own, beside its file, or on the Hub.

Temporary files of a fusion in stages are in `shelf`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers_mixofshow.edlora.defects import list_names
from diffusers_mixofshow.edlora.hub import download, is_repo_id
from diffusers_mixofshow.edlora.reading import within
from diffusers_mixofshow.errors import EDLoRANotFoundError, warn
from diffusers_mixofshow.families import family_of_sites
from diffusers_mixofshow.fusion.collection import Recording, find_differences
from diffusers_mixofshow.fusion.published import DamagedStatisticsError, MaxBytes, SourceStatistics, statistics_path
from diffusers_mixofshow.fusion.sources import FusionInput, FusionSource, LoRASource, Source, refuse_defects


@dataclass(frozen=True, kw_only=True)
class StatisticsStore:
    """Finds statistics of sources, checks whether they can be used, and saves new ones.

    Args:
        folder: Where statistics are kept, instead of beside the sources.
        max_bytes: Size of a concept's saved statistics, see `SourceStatistics.save`.
        recording: Settings that statistics must have been recorded with; None without a pipeline: then any are used.
        usual: Default settings, which replace values that files of earlier releases leave open.
    """

    folder: Path | None = None
    max_bytes: MaxBytes = "auto"
    recording: Recording | None = None
    usual: Recording | None = None

    def attach(self, sources: Sequence[Source], given: Sequence[FusionInput]) -> tuple[Source, ...]:
        """Add the statistics that exist to their sources; `given` is what the user gave for each of them.

        Raises:
            FusionError: If statistics given with a source do not fit it, or a newer release wrote a file.
        """
        return tuple(self._attach(source, own) for source, own in zip(sources, given, strict=True))

    def has_usable(self, source: Source, sites: Sequence[str]) -> bool:
        """Whether a source has statistics that can be used for these layers."""
        return not self._misfits(source, sites)

    def _misfits(self, source: Source, sites: Sequence[str]) -> list[str]:
        """Why its statistics cannot be used; layers and settings only count if they can be recorded again."""
        statistics, misfits = source.statistics, source.misfits
        if misfits or statistics is None or self.recording is None or self.usual is None:
            return misfits
        inputs = family_of_sites(sites).by_input(sites).keys()
        lacking = sorted(set().union(*(inputs - set(concept.inputs) for concept in statistics.concepts.values())))
        if lacking:
            misfits.append(
                f"the statistics given with {source.name} lack layers that are fused: {list_names(lacking)}"
            )
        wanted = self.recording.as_json(source.prompts)
        if differing := find_differences(statistics.recording, wanted, self.usual.as_json()):
            misfits.append(f"the statistics given with {source.name} were recorded with {', '.join(differing)}")
        return misfits

    def writable_folder(self, source: Source) -> Path | None:
        """The folder in which files of a source can be kept; None if there is none that is writable."""
        if self.folder is not None:
            return self.folder
        return None if source.home is None or not os.access(source.home.parent, os.W_OK) else source.home.parent

    def choose_place(self, source: Source, sites: Sequence[str], *, publishing: bool) -> Path | None:
        """The file for new statistics of a source; None if they are for this fusion alone.

        A fusion does not overwrite valid statistics of other settings beside the source: others may need them.

        Args:
            source: The source to be recorded.
            sites: The layers that are fused.
            publishing: Whether the user asked to record, not to fuse: then statistics beside the source are replaced.

        Warns:
            MixOfShowWarning: If there are statistics that cannot be used; says why.
        """
        found = source.statistics
        place = self._place(source) if publishing or self.folder is not None or found is None else None
        if found is not None:
            why, fate = "; ".join(self._misfits(source, sites)), ""
            if place is None and found.file is not None:
                fate = f" for this fusion alone ({found.file} stays; GradientFuser.record replaces it)"
            elif place is not None and place.exists():
                fate = f", in place of what is in {place}"
            warn(f"Statistics are recorded again{fate}: {why}.")
        return place

    def put(self, source: Source, statistics: SourceStatistics, place: Path | None) -> Source:
        """Write statistics to their file and load them from it; without a file they stay in memory."""
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            statistics = SourceStatistics.load(statistics.save(place, max_bytes=self.max_bytes, overwrite=True))
        return replace(source, statistics=statistics)

    def read_again(self, source: Source, sites: Sequence[str]) -> Source:
        """Load statistics that another process may have written meanwhile."""
        place = self._place(source)
        if self.has_usable(source, sites) or place is None or not place.exists():
            return source
        return replace(source, statistics=SourceStatistics.load(place))

    def _place(self, source: Source) -> Path | None:
        """The file of a source's statistics; None if there is no writable folder for it."""
        if self.folder is not None:
            return statistics_path(self.folder / f"{source.edlora.digest[:16]}.safetensors")
        return None if source.home is None or self.writable_folder(source) is None else statistics_path(source.home)

    def _attach(self, source: Source, given: FusionInput) -> Source:
        """Add statistics that the user gave, which must fit; else those beside its file; else those in the folder."""
        if isinstance(given, FusionSource | LoRASource) and given.statistics is not None:
            own = given.statistics
            statistics = own if isinstance(own, SourceStatistics) else SourceStatistics.load(own)
            source = replace(source, statistics=statistics)
            refuse_defects(source.misfits)
        elif source.statistics is None and source.file is not None:
            location = source.origin if is_repo_id(source.origin) else source.file.parent
            source = self._load(source, statistics_beside(location, file_name=source.file.name))
        if self.folder is not None and not self.has_usable(source, ()):
            source = self._load(source, self._place(source))
        return source

    def _load(self, source: Source, path: Path | None) -> Source:
        """Add the statistics of a file, if there is one; a damaged file counts as none if it can be recorded again."""
        if path is None or not path.exists():
            return source
        try:
            return replace(source, statistics=SourceStatistics.load(path))
        except DamagedStatisticsError as error:
            if self.recording is None:
                raise
            warn(f"Statistics are recorded again: {error.args[0]}.")
            return replace(source, statistics=None)


def statistics_beside(
    location: str | os.PathLike[str], *, file_name: str, subfolder: str | None = None, **hub: Any
) -> Path | None:
    """The file of statistics beside a LoRA's file, if it exists; downloaded from the Hub if necessary.

    Args:
        location: Folder, file or Hub id.
        file_name: Name of the LoRA's file.
        subfolder: Folder within `location`.
        hub: How to read a Hub id, see `hub.download`.
    """
    name = statistics_path(Path(file_name)).name
    if is_repo_id(location):
        try:
            return download(str(location), name, subfolder=subfolder, **hub)
        except EDLoRANotFoundError:
            return None
    path = Path(location, subfolder or "")
    path = within(path, name) if path.is_dir() else statistics_path(path)
    return path if path.exists() else None
