"""Read the sources of `mixofshow fuse`: ED-LoRAs, plain LoRAs with trigger prompts, or a TOML file that lists them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_mixofshow.cli.settings import read_toml
from diffusers_mixofshow.errors import ConfigurationError, warn


if TYPE_CHECKING:
    from diffusers_mixofshow.fusion import FusionSource, LoRASource
    from diffusers_mixofshow.fusion.sources import Source

_TABLE = "source"
_LIST = ".toml"
_SHOWN = 80
"""Characters of a prompt that a source's line shows."""
_KINDS = {
    "path": (str,),
    "prompts": (list,),
    "weight": (int, float),
    "scale": (int, float),
    "name": (str,),
    "statistics": (str,),
}


def read_sources(
    given: Sequence[str], prompts: Sequence[str], *, recorded: bool = True
) -> list[FusionSource | LoRASource]:
    """Read the sources that the command line names.

    Args:
        given: Hub ids, folders and files of ED-LoRAs, other programs' concepts and plain LoRAs; TOML files of sources.
        prompts: Trigger prompts, separated by ``|``, one entry for each plain LoRA whose file does not name its
            trigger words or prompts, or one for each plain LoRA, in their order.
        recorded: Whether the method records features, so that every plain LoRA must have prompts.

    Raises:
        ConfigurationError: If the number of prompts is another, or a TOML file cannot be read.
    """
    from diffusers_mixofshow.fusion import FusionSource, LoRASource
    from diffusers_mixofshow.interop.opening import open_edlora

    _refuse_missing_sources(given)
    opened = {path: open_edlora(path) for path in given if not path.endswith(_LIST)}
    plain = [path for path in given if path in opened and not opened[path].edlora.concepts]
    silent = [path for path in plain if not opened[path].tells_prompts]
    prompts_of = dict(zip(silent if len(prompts) == len(silent) else plain, prompts, strict=False))
    if len(prompts) not in (len(silent), len(plain)) and (prompts or recorded):
        raise ConfigurationError(
            f"Got --prompts {len(prompts)} times for {len(silent)} plain LoRAs ({', '.join(silent) or 'none'}) whose "
            f"files tell no trigger words, of {len(plain)} in all. Give it once for each in their order, as in "
            "--prompts 'photo of sks dog | sks dog on the beach'."
        )
    sources: list[FusionSource | LoRASource] = []
    for path in given:
        if path.endswith(_LIST):
            sources += _read_list(Path(path), recorded=recorded)
        elif path in plain:
            texts = [one.strip() for one in prompts_of.get(path, "").split("|") if one.strip()]
            sources.append(LoRASource(path, texts, opened=opened[path]))
        else:
            sources.append(FusionSource(path, opened=opened[path]))
    return sources


def _refuse_missing_sources(given: Sequence[str]) -> None:
    """Refuse sources of a pack on this disk that keeps none."""
    from diffusers_mixofshow.edlora.folder import SOURCES

    for path in map(Path, given):
        pack = path.parent.parent
        if path.parent.name == SOURCES and not path.parent.exists() and any(pack.glob("*.safetensors")):
            raise ConfigurationError(
                f"Got {path.as_posix()!r}, but the pack {pack.as_posix()!r} keeps no sources. Expected one that was "
                "fused with --features own --keep-sources: fuse it so once more, then concepts can be added and left "
                "out."
            )


def describe_sources(
    given: Sequence[FusionSource | LoRASource], gathered: Sequence[Source], weights: Sequence[float] | None
) -> list[str]:
    """Describe each source in one line.

    Args:
        given: The sources as they were given.
        gathered: The same sources with their prompts.
        weights: Weights on the command line.
    """
    from diffusers_mixofshow.edlora.folder import SOURCES

    counts = [_count_members(source) for source in given]
    every = " ".join(f"--weight {count}" for count in counts)
    is_weighted = weights or any(source.weight != 1 for source in gathered)
    lines = []
    for source, read, count in zip(given, gathered, counts, strict=True):
        line = _describe_source(source, [] if read.edlora.concepts else _list_prompts(read))
        carried = Path(str(source.source), SOURCES)
        if count > 1 and carried.is_dir():
            line += f"; to add or leave out one, fuse its sources instead, {carried.as_posix()}/*"
        if count > 1 and len(given) > 1 and not is_weighted:
            line += f"; it counts as one of the sources: {every} gives each of its {count} the weight of one"
        lines.append(line)
    return lines


def _count_members(source: FusionSource | LoRASource) -> int:
    """How many concepts or plain LoRAs are in a source, as far as its file tells."""
    opened = source.opened
    return 1 if opened is None else max(1, len(opened.edlora.concepts) + len(opened.members))


def warn_of_swapped_prompts(gathered: Sequence[Source], given: Sequence[FusionSource | LoRASource]) -> None:
    """Warn of plain LoRAs whose name or trigger words are in the prompts of another, but not in their own."""
    texts = {read.name: " | ".join(_list_prompts(read)) for read in gathered if not read.edlora.concepts}
    told = []
    for read, source in zip(gathered, given, strict=True):
        if not (own := texts.get(read.name)):
            continue
        words = [*read.prompts, *(source.opened.trigger_words if source.opened else ())]
        others = [name for name, text in texts.items() if name != read.name and _names_any(text, words)]
        if others and not _names_any(own, words):
            told.append(f"{read.name} is named by the prompts of {', '.join(others)}, but not by its own")
    if told:
        warn(f"{'; '.join(told)}. --prompts go by the order of the files: are they in that order?")


def _list_prompts(source: Source) -> list[str]:
    return [text for texts in source.prompts.values() for text in texts]


def _names_any(text: str, words: Sequence[str]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in words)


def _describe_source(source: FusionSource | LoRASource, prompts: Sequence[str]) -> str:
    """Describe a source in one line, as far as its file tells."""
    from diffusers_mixofshow.edlora.defects import sanitise
    from diffusers_mixofshow.edlora.fusion_record import list_entries
    from diffusers_mixofshow.interop.summary import origin_of_foreign, origin_of_pack

    shown = f"prompts {prompts[0][:_SHOWN]!r}{'; ...' if len(prompts) > 1 else ''} ({len(prompts)})" if prompts else ""
    opened = source.opened
    if opened is None:
        return f"{source.source}: {shown}" if shown else str(source.source)
    told = origin_of_pack(opened.edlora) if opened.foreign is None else origin_of_foreign(opened.foreign)
    lora = opened.edlora.lora
    ranks = sorted({update.rank for update in lora.values()})
    members = opened.members if list_entries(opened.edlora.training) and not opened.edlora.concepts else {}
    counts = ", ".join(str(len(texts)) for texts in members.values())
    parts = [
        f"{told['kind']} of {told['architecture'] or 'an unknown base'}",
        f"names of {told['layout']}",
        f"rank {' and '.join(map(str, ranks))}, {len(lora)} layers" if lora else "no updates of layers",
        f"tuned on {sanitise(told['base_model'])}" if told["base_model"] else "",
        shown,
        f"trigger words {', '.join(map(repr, opened.trigger_words))}" if opened.trigger_words else "",
        f"fused from {sanitise(', '.join(members))} (prompts in its record: {counts})" if members else "",
    ]
    return f"{source.source}: {', '.join(filter(None, parts))}"


def _read_list(path: Path, *, recorded: bool) -> list[FusionSource | LoRASource]:
    """Read a TOML file with a table ``[[source]]`` for each source; paths are relative to the file."""
    content = read_toml(path)
    tables = content.get(_TABLE)
    if set(content) != {_TABLE} or not isinstance(tables, list):
        raise ConfigurationError(
            f"{path}: expected tables [[{_TABLE}]] and nothing else, got {', '.join(content) or 'nothing'}."
        )
    defects = [
        f"{_TABLE} {number}: {defect}" for number, table in enumerate(tables, 1) for defect in _find_defects(table)
    ]
    if defects:
        raise ConfigurationError(f"{path}: " + "; ".join(defects) + ".")
    return [_make_source(table, path.parent, recorded=recorded) for table in tables]


def _find_defects(table: object) -> list[str]:
    """Find what is wrong with one table."""
    if not isinstance(table, dict):
        return [f"must be a table, got {table!r}"]
    defects = [f"unknown key {key!r}, expected {', '.join(_KINDS)}" for key in table if key not in _KINDS]
    defects += [
        f"{key} must be {' or '.join(kind.__name__ for kind in kinds)}, got {table[key]!r}"
        for key, kinds in _KINDS.items()
        if key in table and (not isinstance(table[key], kinds) or isinstance(table[key], bool))
    ]
    defects += _find_wrong_numbers(table)
    prompts = table.get("prompts")
    if isinstance(prompts, list) and not all(isinstance(prompt, str) for prompt in prompts):
        defects.append("prompts must be strings")
    if "path" not in table:
        defects.append("path is missing")
    return defects


def _find_wrong_numbers(table: dict[str, Any]) -> list[str]:
    """Find a weight that is no share, and a scale that is no factor."""
    from diffusers_mixofshow.edlora.fusion_record import as_number

    numbers = {key: table[key] for key in ("weight", "scale") if type(table.get(key)) in _KINDS[key]}
    return [
        f"{key} must be finite{' and above 0' if key == 'weight' else ''}, got {value}"
        for key, value in numbers.items()
        if as_number(value) is None or (key == "weight" and value <= 0)
    ]


def _make_source(table: dict[str, Any], folder: Path, *, recorded: bool) -> FusionSource | LoRASource:
    from diffusers_mixofshow.fusion import FusionSource, LoRASource
    from diffusers_mixofshow.interop.opening import open_edlora

    values = dict(table)
    values["source"] = _resolve_path(values.pop("path"), folder)
    if "statistics" in values:
        values["statistics"] = folder / values["statistics"]
    if "prompts" in values:
        return LoRASource(**values)
    opened = open_edlora(values["source"])
    if not opened.edlora.concepts and (opened.tells_prompts or not recorded):
        return LoRASource(**values, opened=opened)
    if not opened.edlora.concepts:
        raise ConfigurationError(
            f"{values['source']} is a plain LoRA: add prompts = ['...'] with its trigger words to its table."
        )
    if "name" in values:
        raise ConfigurationError(f"{values['source']} has concepts, which have names of their own: leave name out.")
    return FusionSource(**values, opened=opened)


def _resolve_path(path: str, folder: Path) -> str:
    """Resolve a path against a folder if that exists; otherwise it is a Hub id or an absolute path."""
    return str(folder / path) if (folder / path).exists() else path
