"""Where the statistics of sources lie: given with one, in a folder of their own, beside its file, or on the Hub.

Nothing else knows these places, but for the files that live as long as one fusion in stages (`shelf`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers_mixofshow.edlora.defects import listed
from diffusers_mixofshow.edlora.file import FILE_NAME
from diffusers_mixofshow.edlora.hub import download, is_repo_id
from diffusers_mixofshow.edlora.reading import within
from diffusers_mixofshow.errors import EDLoRANotFoundError, FusionError, warn
from diffusers_mixofshow.families import family_of_sites
from diffusers_mixofshow.fusion.collection import Recording, differences
from diffusers_mixofshow.fusion.published import DamagedStatisticsError, MaxBytes, SourceStatistics, statistics_path
from diffusers_mixofshow.fusion.sources import FusionInput, FusionSource, LoRASource, Source


@dataclass(frozen=True, kw_only=True)
class StatisticsStore:
    """Finds statistics of sources, says whether they serve, and keeps what is recorded.

    Args:
        folder: Where statistics are kept, instead of beside the sources.
        max_bytes: Size of a concept's kept statistics, see `SourceStatistics.save`.
        recording: How statistics shall have been recorded; None where nothing can be recorded, so that any serve.
        usual: The same of settings left open altogether, which files of earlier releases do not spell out.
    """

    folder: Path | None = None
    max_bytes: MaxBytes = "auto"
    recording: Recording | None = None
    usual: Recording | None = None

    def attach(self, sources: Sequence[Source], given: Sequence[FusionInput]) -> tuple[Source, ...]:
        """The sources with their statistics, as far as there are any.

        Args:
            sources: What to fuse.
            given: What each was read from.

        Raises:
            FusionError: If statistics that were given on purpose do not fit, or a newer release wrote a file.
        """
        pairs = zip(sources, given, strict=True)
        return tuple(self._from_folder(replace(one, statistics=self._given_or_beside(one, own))) for one, own in pairs)

    def serves(self, source: Source, sites: Sequence[str]) -> bool:
        """Whether a source has statistics that can be used for these layers."""
        return source.statistics is not None and not self.misfits(source, source.statistics, sites)

    def misfits(self, source: Source, statistics: SourceStatistics, sites: Sequence[str]) -> list[str]:
        """Why statistics are not the source's; where they can be recorded, also why not of all layers and settings."""
        misfits = source.misfits(statistics)
        if misfits or self.recording is None or self.usual is None:
            return misfits
        inputs = family_of_sites(sites).by_input(sites).keys()
        lacking = sorted(set().union(*(inputs - set(concept.inputs) for concept in statistics.concepts.values())))
        if lacking:
            misfits.append(f"the statistics given with {source.name} lack layers that are fused: {listed(lacking)}")
        wanted = self.recording.as_json(source.prompts)
        if differing := differences(statistics.recording, wanted, self.usual.as_json()):
            misfits.append(f"the statistics given with {source.name} were recorded with {', '.join(differing)}")
        return misfits

    def room(self, source: Source) -> Path | None:
        """The folder in which files of a source may be kept; None where there is no room for any."""
        if self.folder is not None:
            return self.folder
        return None if source.home is None or not os.access(source.home.parent, os.W_OK) else source.home.parent

    def choose_place(self, source: Source, sites: Sequence[str], *, publishing: bool) -> Path | None:
        """Where new statistics of a source go; None where they serve this fusion alone.

        Sound statistics beside the source, though of other settings, are somebody's to keep.

        Args:
            source: Of which statistics are to be recorded.
            sites: The layers that are fused.
            publishing: Whether recording is all that is asked for: then what lies beside the source is replaced.

        Warns:
            MixOfShowWarning: Why statistics that are there do not serve.
        """
        found = source.statistics
        place = self._place(source) if publishing or self.folder is not None or found is None else None
        if found is not None:
            why, fate = "; ".join(self.misfits(source, found, sites)), ""
            if place is None and found.file is not None:
                fate = f" for this fusion alone ({found.file} stays; GradientFuser.record replaces it)"
            elif place is not None and place.exists():
                fate = f", in place of what is in {place}"
            warn(f"Statistics are recorded again{fate}: {why}.")
        return place

    def put(self, source: Source, statistics: SourceStatistics, place: Path | None) -> Source:
        """Write statistics to their place and take them from there; where there is none, they stay in memory."""
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            statistics = SourceStatistics.load(statistics.save(place, max_bytes=self.max_bytes, overwrite=True))
        return replace(source, statistics=statistics)

    def read_again(self, source: Source, sites: Sequence[str]) -> Source:
        """A source with the statistics that another process may have written just now."""
        place = self._place(source)
        if self.serves(source, sites) or place is None or not place.exists():
            return source
        return replace(source, statistics=SourceStatistics.load(place))

    def _place(self, source: Source) -> Path | None:
        """The file in which a source's statistics are kept; None where there is no room for one."""
        if self.folder is not None:
            return self.folder / f"{source.edlora.digest[:16]}.statistics.safetensors"
        return None if source.home is None or self.room(source) is None else statistics_path(source.home)

    def _from_folder(self, source: Source) -> Source:
        """The source with what the folder has of it, unless it brings some that serve."""
        place = None if self.folder is None else self._place(source)
        if place is None or not place.exists() or self.serves(source, ()):
            return source
        return replace(source, statistics=self._load(place))

    def _given_or_beside(self, source: Source, given: FusionInput) -> SourceStatistics | None:
        """Statistics that were given with a source, which must fit it, or lie beside it."""
        if isinstance(given, FusionSource | LoRASource) and given.statistics is not None:
            own = given.statistics
            statistics = own if isinstance(own, SourceStatistics) else SourceStatistics.load(own)
            if misfits := source.misfits(statistics):
                raise FusionError("These ED-LoRAs cannot be fused: " + "; ".join(misfits))
            return statistics
        if source.statistics is not None or source.file is None:
            return source.statistics
        location = source.origin if is_repo_id(source.origin) else source.file.parent
        beside = statistics_beside(location, file_name=source.file.name)
        return None if beside is None else self._load(beside)

    def _load(self, path: Path) -> SourceStatistics | None:
        """Statistics in a file; None of a damaged one, where they can be recorded again."""
        try:
            return SourceStatistics.load(path)
        except DamagedStatisticsError as error:
            if self.recording is None:
                raise
            warn(f"Statistics are recorded again: {error.args[0]}.")
            return None


def statistics_beside(
    location: str | os.PathLike[str], *, subfolder: str = "", revision: str | None = None, file_name: str = FILE_NAME
) -> Path | None:
    """The file of statistics beside a LoRA's, if there is one.

    Args:
        location: Folder, file or Hub id.
        subfolder: Folder in it.
        revision: Of a Hub id.
        file_name: What the LoRA's file is called.
    """
    name = statistics_path(Path(file_name)).name
    if is_repo_id(location):
        where = {"revision": revision, "subfolder": subfolder or None}
        try:
            return download(str(location), name, token=None, cache_dir=None, local_files_only=False, **where)
        except EDLoRANotFoundError:
            return None
    path = Path(location, subfolder)
    path = within(path, name) if path.is_dir() else statistics_path(path)
    return path if path.exists() else None
