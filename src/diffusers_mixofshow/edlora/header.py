"""The JSON in the header of an ED-LoRA file: everything but the tensors. Its content is untrusted."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeGuard, TypeVar

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora.defects import is_showable, sanitise
from diffusers_mixofshow.errors import ConceptError, EDLoRAFormatError
from diffusers_mixofshow.versions import PACKAGE, installed_version


FORMAT_VERSION = 2
"""Newest format version, for files with embeddings for several text encoders."""
ONE_ENCODER = 1
"""Format version of all other files, so that older releases can read them."""

_LIBRARIES = (PACKAGE, "torch", "diffusers", "transformers", "peft")
_LONGEST = 4 * 2**20
_LONGEST_TEXT = 500
"""Longest base model id or layer name, in characters."""

_TEXT = f"a string of at most {_LONGEST_TEXT} characters without control characters"

_Fallback = TypeVar("_Fallback")


@dataclass(frozen=True, kw_only=True)
class Header:
    """All fields of an ED-LoRA except its tensors.

    Args:
        concepts: The concepts it holds.
        base_model: Id of the model it was tuned on.
        layers: The U-Net's cross-attention layers, or their groups, down, mid, up.
        lora: Site name to the rank and alpha of its update.
        training: Settings and measurements, JSON values only.
        version: Version of the format.
    """

    concepts: tuple[Concept, ...]
    base_model: str
    layers: tuple[str, ...]
    lora: Mapping[str, tuple[int, float]]
    training: Mapping[str, object]
    version: int = ONE_ENCODER

    def to_json(self) -> str:
        """Write the header; raises `EDLoRAFormatError` if the training record is not made of JSON values."""
        values = {
            "format_version": self.version,
            "concepts": [asdict(concept) for concept in self.concepts],
            "base_model": self.base_model,
            "layers": list(self.layers),
            "lora": {site: {"rank": rank, "alpha": alpha} for site, (rank, alpha) in self.lora.items()},
            "training": dict(self.training),
            "versions": {library: installed_version(library) or "not installed" for library in _LIBRARIES},
        }
        try:
            text = json.dumps(values, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise EDLoRAFormatError(
                f"The training record must be made of JSON values (finite numbers, strings, lists, dicts): {error}. "
                "Convert tensors, paths and the like before saving."
            ) from error
        if len(text) > _LONGEST:
            raise EDLoRAFormatError(
                f"The header has {len(text):,} characters, longer than the {_LONGEST:,} that are read. Keep long "
                "records in a file of their own, not in `training`."
            )
        return text


EMPTY = Header(concepts=(), base_model="", layers=(), lora={}, training={})


def parse(text: str) -> tuple[Header, list[str]]:
    """Parse a header and list its defects.

    Args:
        text: The JSON string from the file.

    Returns:
        The header, with empty values for defective fields, and the defects.
    """
    values = decode(text)
    if not isinstance(values, dict):
        return EMPTY, ["its header is not a JSON object"]
    version = values.get("format_version")
    if type(version) is not int or not ONE_ENCODER <= version <= FORMAT_VERSION:
        return EMPTY, [f"format version {_short(version)}, this release reads {ONE_ENCODER} to {FORMAT_VERSION}"]
    reader = _Reader(values)
    header = Header(
        concepts=reader.concepts(),
        base_model=reader.string("base_model"),
        layers=reader.strings("layers"),
        lora=reader.ranks_and_alphas(),
        training=reader.mapping("training"),
        version=version,
    )
    return header, reader.defects


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is a short string without terminal control characters."""
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT and is_showable(value)


def decode(text: str) -> object:
    """Decode JSON; None if it is invalid, or longer than this package writes."""
    if len(text) > _LONGEST:
        return None
    was_enabled = gc.isenabled()
    gc.disable()  # collection slows the parsing of a million small lists
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
    finally:
        if was_enabled:
            gc.enable()


class _Reader:
    """Reads typed values from decoded JSON and lists those that are missing or of another type."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self.values = values
        self.defects: list[str] = []

    def string(self, key: str) -> str:
        value = self.values.get(key)
        return value if is_text(value) else self._note(key, _TEXT, "")

    def strings(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key)
        if isinstance(value, list) and all(is_text(item) for item in value):
            return tuple(value)
        return self._note(key, f"a list, each {_TEXT}", ())

    def mapping(self, key: str) -> Mapping[str, object]:
        value = self.values.get(key)
        return value if isinstance(value, dict) else self._note(key, "an object", {})

    def ranks_and_alphas(self) -> dict[str, tuple[int, float]]:
        entries = self.values.get("lora")
        if isinstance(entries, dict) and all(_is_rank_and_alpha(entry) for entry in entries.values()):
            return {site: (entry["rank"], float(entry["alpha"])) for site, entry in entries.items()}
        return self._note("lora", "an object of layer names, each with a whole rank and a finite alpha", {})

    def concepts(self) -> tuple[Concept, ...]:
        entries = self.values.get("concepts")
        if not isinstance(entries, list):
            return self._note("concepts", "a list of objects", ())
        found = []
        for number, entry in enumerate(entries):
            if _is_concept_entry(entry):
                try:
                    found.append(Concept(**(entry | {"tokens": tuple(entry["tokens"])})))
                except ConceptError as error:
                    self.defects.append(sanitise(str(error)))
            else:
                self._note(f"concepts[{number}]", "an object with placeholder, tokens, class_word and kind", None)
        return tuple(found)

    def _note(self, key: str, expected: str, fallback: _Fallback) -> _Fallback:
        name = key.partition("[")[0]
        got = _short(self.values[name]) if name in self.values else "nothing"
        self.defects.append(f"header field {key!r} must be {expected}, got {got}")
        return fallback


def _is_rank_and_alpha(entry: object) -> bool:
    if not (isinstance(entry, dict) and set(entry) == {"rank", "alpha"}):
        return False
    if type(entry["rank"]) is not int or type(entry["alpha"]) not in (int, float):
        return False
    try:
        return math.isfinite(float(entry["alpha"]))
    except OverflowError:
        return False


def _is_concept_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == {"placeholder", "tokens", "class_word", "kind"}
        and all(isinstance(entry[key], str) for key in ("placeholder", "class_word", "kind"))
        and isinstance(entry["tokens"], list)
        and all(isinstance(token, str) for token in entry["tokens"])
    )


def _short(value: object) -> str:
    return sanitise(repr(value), 80)
