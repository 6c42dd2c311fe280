"""The sources of a pack: written into its folder, listed in its file, and found again to change the pack."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_mixofshow.atomic import portable_name, refuse_overwriting
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.file import PLAIN_NAME
from diffusers_mixofshow.edlora.folder import SOURCES, find_places, remove
from diffusers_mixofshow.edlora.fusion_record import (
    CARRIED,
    find_plain_prompts,
    find_prompts,
    write_carried_record,
)
from diffusers_mixofshow.edlora.hub import is_repo_id
from diffusers_mixofshow.errors import (
    ConfigurationError,
    EDLoRANotFoundError,
    FusionError,
    MixOfShowError,
    OverwriteError,
)
from diffusers_mixofshow.fusion.published import SourceStatistics, statistics_path
from diffusers_mixofshow.fusion.solving import Settings
from diffusers_mixofshow.fusion.sources import NAME, Source, prompts_of_concepts, scale_updates
from diffusers_mixofshow.fusion.store import statistics_beside
from diffusers_mixofshow.interop.lora_files import write_lora
from diffusers_mixofshow.interop.opening import Opened, open_edlora


def carry(source: Source, folder: Path, base_model: str = "") -> None:
    """Write a source and its statistics into a folder, where `find_source` looks for them.

    Args:
        source: A plain LoRA keeps its name, its prompts and its base model, as an ED-LoRA does.
        folder: The folder of this source alone.
        base_model: What the pack was fused for, if neither the source nor its statistics name a base.
    """
    if source.edlora.concepts:
        path = source.edlora.save_pretrained(folder, overwrite=True)
    else:
        record = write_carried_record(source.edlora.training, source.prompts, source.base_model or base_model)
        path = write_lora(folder / PLAIN_NAME, source.edlora.lora, record)
    if source.statistics is not None:
        source.statistics.copy(statistics_path(path))


def carry_all(sources: Sequence[Source], folder: Path, base_model: str) -> None:
    """Write the sources of a pack into its folder, in place of those that an earlier release put there."""
    for source, (place, *earlier) in zip(sources, list_places([one.prompts for one in sources]), strict=True):
        carry(source, folder / place, base_model)
        remove(path for name in earlier if (path := folder / name).exists() and _is_carried(source, path))


def find_replaced(
    folder: Path,
    file_name: str,
    sources: Sequence[Source],
    *further: Path,
    merged: bool = False,
    carried: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Find the files and folders that saving a pack replaces or makes stale, except sources that it carries anyway.

    Args:
        folder: Where the pack is to be saved; may be missing.
        file_name: The pack's file.
        sources: Sources of the pack.
        further: Other files that are written with it.
        merged: Whether a complete pipeline is to be saved.
        carried: Whether the pack carries its sources.
        overwrite: Whether existing files may be replaced; sources never are, unless the pack carries them.

    Raises:
        OverwriteError: If a source would be lost, or something exists that may not be replaced; names all of it.
        FusionError: If two sources would be carried in the same folder.
    """
    if carried:
        _check_carried(sources)
    replaced = find_places(folder, file_name, merged=merged)
    places = [*leave_out_carried(replaced, folder, sources), *further]
    _refuse_replacing(sources, places, carried=carried)
    refuse_overwriting(*places, overwrite=overwrite)
    return places


def _refuse_replacing(sources: Sequence[Source], places: Sequence[Path], *, carried: bool) -> None:
    """Refuse to overwrite or delete a source of the pack that is being written, even with ``overwrite=True``.

    A source of another scale is carried with scaled updates, so that the original would be lost all the same.
    """
    gone = [place.resolve() for place in places]
    left = [source for source in sources if not (carried and source.scale == 1)]
    homes = {source.origin: source.home.resolve() for source in left if source.home is not None}
    if lost := [origin for origin, home in homes.items() if any(home.is_relative_to(place) for place in gone)]:
        raise OverwriteError(
            f"The result would replace its own source: {', '.join(lost)}. Choose another place, or keep sources at "
            "scale 1 in the pack: sources=True, --keep-sources."
        )


def find_source(entry: Mapping[str, Any], carrier: str | os.PathLike[str], *inside: str, **hub: Any) -> Source:
    """Find a source of a pack again: in the pack's folder or repository, or at its origin on the Hub.

    Args:
        entry: Its entry in the pack's report.
        carrier: Folder or Hub id of the pack.
        inside: Where it may be in there, see `list_places`.
        hub: How to read from the Hub: `revision` of the pack, `token`, `cache_dir` and `local_files_only`.

    Raises:
        FusionError: If it is at neither place, or has changed.
    """
    origin = entry["origin"] if is_repo_id(entry["origin"]) else ""  # paths named in a file are never opened
    at_origin = {**hub, "revision": entry.get("revision") or None}
    places = [
        *((carrier, 1.0, None, {**hub, "subfolder": place}) for place in inside),
        (origin, entry["scale"], None, at_origin),
        (origin, entry["scale"], PLAIN_NAME, at_origin),  # without the embeddings beside it
    ]
    changed = False
    for location, scale, name, where in places:
        opened = _open_at(location, weight_name=name, **where)
        if opened is None:
            continue
        edlora = scale_updates(opened.edlora, scale)
        if edlora.digest == entry["digest"]:
            path = statistics_beside(location, file_name=opened.file.name, **where)
            statistics = None if path is None else SourceStatistics.load(path)
            return Source(
                edlora=edlora,
                weight=entry["weight"],
                scale=entry["scale"],
                prompts=_prompts_of(entry["concepts"], edlora, statistics),
                origin=origin,
                file=opened.file if location == origin else None,
                statistics=statistics,
                own=opened.edlora if location == origin else None,
            )
        changed = True
    fate = "has changed since" if changed else "cannot be found"
    raise FusionError(
        f"The pack was fused from {'+'.join(entry['concepts'])}, which {fate} "
        f"({f'it came from {origin}' if origin else 'it came from a disk'}). Save packs with sources=True, which "
        "carries them along, or fuse all sources anew."
    )


def _prompts_of(
    names: Sequence[str], edlora: EDLoRA, statistics: SourceStatistics | None
) -> dict[str, tuple[str, ...]]:
    """Prompts of a source that was found again: those of its statistics, else of its file, else the defaults."""
    recorded = find_plain_prompts(edlora.training)
    recorded |= {} if statistics is None else find_prompts({CARRIED: statistics.recording.get("prompts")})
    defaults = prompts_of_concepts(edlora) | {name: () for name in names if not name.startswith("<")}
    return {name: tuple(recorded.get(name, texts)) for name, texts in defaults.items()}


def _open_at(location: str | os.PathLike[str], **where: Any) -> Opened | None:
    """Open the file at a location; None if there is none."""
    try:
        return open_edlora(location, **where) if location else None
    except EDLoRANotFoundError:
        return None


def leave_out_carried(found: Sequence[Path], folder: Path, sources: Sequence[Source]) -> list[Path]:
    """Paths without the sources that the folder already carries as a pack of these sources would."""
    own: dict[Path, Source] = {}
    for source, places in zip(sources, list_places([one.prompts for one in sources]), strict=True):
        there = [path for place in places if (path := Path(folder, place)).exists()]
        own |= dict.fromkeys(there[:1], source)
    return [path for path in found if path not in own or not _is_carried(own[path], path)]


def _is_carried(source: Source, folder: Path) -> bool:
    """Whether a folder holds what `carry` writes of a source."""
    try:
        opened = _open_at(folder)
    except MixOfShowError:
        return False
    return opened is not None and opened.edlora.digest == source.edlora.digest


def _check_carried(sources: Sequence[Source]) -> None:
    """Refuse sources that a pack would carry in the same folder; case is ignored, as by some file systems."""
    folders: dict[str, list[str]] = {}
    for source, places in zip(sources, list_places([one.prompts for one in sources]), strict=True):
        folders.setdefault(places[0].casefold(), []).append(source.name)
    if clashes := [" and ".join(names) for names in folders.values() if len(names) > 1]:
        raise FusionError(
            f"A pack that carries its sources would have one folder for {'; for '.join(clashes)}. Give plain LoRAs "
            "other names (name='...'), rename a concept, or leave the sources out."
        )


def list_places(named: Sequence[Iterable[str]]) -> list[tuple[str, ...]]:
    """Paths of the sources in a pack that carries all of them.

    Args:
        named: Of each source the placeholders of its concepts, and names of plain LoRAs.

    Returns:
        Of each source where it is written, such as ``sources/potter``, then where an earlier release wrote it. A plain
        LoRA is at ``sources/ink``; at ``sources/lora-ink``, as in earlier releases, if another one were there too.
    """
    groups = [tuple(names) for names in named]
    places = [(_name_folder(names), _name_folder(names, mark="lora-")) for names in groups]
    taken = Counter(short.casefold() for short, _ in places)
    return [
        (marked,) if marked == short or taken[short.casefold()] > 1 else (short, marked) for short, marked in places
    ]


def _name_folder(names: Iterable[str], *, mark: str = "") -> str:
    """Path of a source in its pack, with a mark before names of plain LoRAs."""
    spelt = [name[1:-1] if name.startswith("<") else f"{mark}{name}" for name in names]
    name = re.sub(r"[^\w.+-]", "_", "+".join(spelt)).lstrip(".")  # never out of the folder
    return f"{SOURCES}/{portable_name(name)}"


def read_record(record: Mapping[str, Any]) -> tuple[Settings, list[Mapping[str, Any]]]:
    """Read settings and sources from the report of a fusion.

    Raises:
        FusionError: If entries are missing or of another form than this release writes; names them.
    """
    defects = [f"no {key}" for key in ("method", "ridge", "max_rank", "sources") if key not in record]
    entries = record.get("sources")
    if not isinstance(entries, list):
        defects, entries = [*defects, "sources that are not a list"], []
    wrong = [number for number, entry in enumerate(entries) if not _is_source(entry)]
    defects += [f"source {number} has missing or wrong fields" for number in wrong[:6]]
    if not defects:
        try:
            return Settings(**{key: record[key] for key in ("method", "ridge", "max_rank")}), entries
        except (ConfigurationError, FusionError, TypeError, ValueError) as error:
            defects.append(f"settings that cannot be used ({str(error)[:160]})")
    raise FusionError(
        f"The pack's record of its fusion cannot be used: {'; '.join(defects)}. The pack can still be "
        "sampled from (EDLoRA.from_pretrained); to change it, fuse its sources anew."
    )


def _is_source(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    names, weight, scale = entry.get("concepts"), entry.get("weight"), entry.get("scale")
    return (
        isinstance(names, list)
        and bool(names)
        and all(isinstance(name, str) and NAME.fullmatch(name) for name in names)
        and all(isinstance(entry.get(key), str) for key in ("origin", "digest"))
        and isinstance(entry.get("revision", ""), str)
        and all(isinstance(value, int | float) and abs(value) < 1e6 for value in (weight, scale))  # False for NaN
    )
