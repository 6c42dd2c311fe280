"""Read the record of a fusion in a pack's entry `training`, which is untrusted: what has a wrong form is skipped."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers_mixofshow.edlora.header import decode, is_text


PLAIN_KEY = "mixofshow_fusion"
"""Metadata key of a LoRA that was fused from plain LoRAs: its entry `training` and its base model, as JSON."""

CARRIED = "carried_prompts"
"""Key of the entry `training` of a plain LoRA that a pack carries: its name in the pack to its prompts."""

_BASE = "base_model"
_OF_MEMBER = ("concepts", "origin", "revision", "digest")


def write_plain_record(training: Mapping[str, object], base_model: str) -> dict[str, str]:
    """Write the metadata of a LoRA that was fused from plain LoRAs; `base_model` is empty if it is not known."""
    return {PLAIN_KEY: json.dumps({**training, **({_BASE: base_model} if base_model else {})})}


def write_carried_record(
    training: Mapping[str, object], prompts: Mapping[str, Sequence[str]], base_model: str
) -> dict[str, str]:
    """Write the metadata of a plain LoRA that a pack carries, so that it can be fused again as it was.

    Args:
        training: Its entry `training`, with the record of its fusion if it was itself fused from others.
        prompts: Its name in the pack, or those of what it was fused from, to the prompts that it was fused with.
        base_model: What it was fused for; empty if it is not known.
    """
    own = dict(training) if record_of(training) else {}
    texts = {name: list(each) for name, each in prompts.items()}
    return write_plain_record(own if find_plain_prompts(own) == texts else {**own, CARRIED: texts}, base_model)


def read_plain_record(metadata: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Read what was written here into a LoRA's metadata: its entry `training` and base model; else empty."""
    record = dict(as_mapping(decode(metadata.get(PLAIN_KEY, ""))))
    base_model = record.pop(_BASE, "")
    return record, base_model if is_text(base_model) else ""


def as_mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def record_of(training: Mapping[str, object]) -> Mapping[str, Any]:
    """The record of a pack's fusion; empty if it was not fused."""
    return as_mapping(training.get("fusion"))


def list_entries(training: Mapping[str, object]) -> list[Mapping[str, Any]]:
    """The record's entries of the sources, in their order."""
    return _keep_mappings(record_of(training).get("sources"))


def list_members(training: Mapping[str, object]) -> list[dict[str, Any]]:
    """What a pack was fused from, for the record of a pack that it is fused into; of packs in it, what is in those."""
    return [
        {key: member[key] for key in _OF_MEMBER if key in member}
        for entry in list_entries(training)
        for member in find_members(entry) or [entry]
    ]


def find_members(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a source was fused from, by its entry in the record; empty if it is no pack."""
    return _keep_mappings(entry.get("members"))


def _keep_mappings(values: object) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []


Residuals = dict[str, dict[str, float | None]]
"""Source to its residual in the weighted average, ``average``, and after fusing, ``fused``; None if there is none."""


def find_mean_residuals(record: Mapping[str, object]) -> Residuals:
    """Each source's mean residual over layers, out of the record of a fusion; empty if none was measured."""
    mean = as_mapping(as_mapping(record.get("residuals")).get("mean"))
    return {str(name): _read_pair(entry) for name, entry in mean.items() if isinstance(entry, Mapping)}


def find_layer_residuals(record: Mapping[str, object]) -> dict[str, Residuals]:
    """Layer to the residual in it of each source that has a mean; empty if none was measured."""
    layers = as_mapping(as_mapping(record.get("residuals")).get("layers"))
    names = find_mean_residuals(record)
    return {str(site): {name: _read_pair(as_mapping(of).get(name)) for name in names} for site, of in layers.items()}


def _read_pair(entry: object) -> dict[str, float | None]:
    return {key: as_number(as_mapping(entry).get(key)) for key in ("average", "fused")}


def as_number(value: object) -> float | None:
    """The value as a float if it is a number, else None."""
    # float() fails for very long JSON integers.
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


def find_prompts(training: Mapping[str, object]) -> dict[str, list[str]]:
    """Placeholder of each concept, or name of each plain LoRA, to the prompts that it was fused with."""
    recorded = as_mapping(training.get(CARRIED)) or as_mapping(record_of(training).get("prompts"))
    return {
        str(name): [text for text in texts if isinstance(text, str)]
        for name, texts in recorded.items()
        if isinstance(texts, list)
    }


def find_plain_prompts(training: Mapping[str, object]) -> dict[str, list[str]]:
    """Name of each plain LoRA that a pack was fused from, or of one that a pack carries, to its prompts.

    Concepts, whose names have angle brackets, are left out.
    """
    return {name: texts for name, texts in find_prompts(training).items() if not name.startswith("<")}
