"""What a pack's file says of how it was made, read as what it is: a stranger's text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffusers_mixofshow.errors import ConfigurationError, FusionError
from diffusers_mixofshow.fusion.solving import Settings
from diffusers_mixofshow.fusion.sources import NAME


def recorded(record: Mapping[str, Any]) -> tuple[Settings, list[Mapping[str, Any]]]:
    """Settings and sources in a report of fusion.

    Raises:
        FusionError: If it does not say them in the way that this release writes them; names what is wrong.
    """
    defects = [f"no {key}" for key in ("method", "ridge", "max_rank", "sources") if key not in record]
    entries = record.get("sources")
    if not isinstance(entries, list):
        defects, entries = [*defects, "sources that are no list"], []
    wrong = [number for number, entry in enumerate(entries) if not _is_source(entry)]
    defects += [f"source {number} is described in another way" for number in wrong[:6]]
    if not defects:
        try:
            return Settings(**{key: record[key] for key in ("method", "ridge", "max_rank")}), entries
        except (ConfigurationError, FusionError, TypeError, ValueError) as error:
            defects.append(f"settings that cannot be used ({str(error)[:160]})")
    raise FusionError(
        f"The pack's record of its fusion cannot be used: {'; '.join(defects)}. It draws all the same "
        "(EDLoRA.from_pretrained); to change it, fuse its sources anew."
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
        and _is_finite(weight)
        and _is_finite(scale)
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e6 and math.isfinite(value)
