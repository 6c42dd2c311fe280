"""Read the record of a fusion in a pack's entry `training`, which is untrusted: what has a wrong form is skipped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diffusers_mixofshow.edlora.header import decode, is_text


PLAIN_KEY = "mixofshow_fusion"
"""Metadata key of a LoRA that was fused from plain LoRAs: its entry `training` and its base model, as JSON."""

_BASE = "base_model"
_OF_MEMBER = ("concepts", "origin", "revision", "digest")


def write_plain_record(training: Mapping[str, object], base_model: str) -> dict[str, str]:
    """Write the metadata of a LoRA that was fused from plain LoRAs; `base_model` is empty if it is not known."""
    return {PLAIN_KEY: json.dumps({**training, **({_BASE: base_model} if base_model else {})})}


def read_plain_record(metadata: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Read what `write_plain_record` wrote: the entry `training` and the base model, both empty for other files."""
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


def find_prompts(training: Mapping[str, object]) -> dict[str, list[str]]:
    """Placeholder of each concept, or name of each plain LoRA, to the prompts that it was fused with."""
    recorded = as_mapping(record_of(training).get("prompts"))
    return {
        str(name): [text for text in texts if isinstance(text, str)]
        for name, texts in recorded.items()
        if isinstance(texts, list)
    }


def find_plain_prompts(training: Mapping[str, object]) -> dict[str, list[str]]:
    """Name of each plain LoRA that a pack was fused from to its prompts; concepts' names have angle brackets."""
    return {name: texts for name, texts in find_prompts(training).items() if not name.startswith("<")}
