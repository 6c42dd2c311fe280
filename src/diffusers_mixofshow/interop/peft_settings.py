"""Read PEFT's settings of a LoRA: their place, the scaling they define, and unsupported ones as defects."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers_mixofshow.edlora import stock
from diffusers_mixofshow.edlora.defects import list_names, sanitise
from diffusers_mixofshow.edlora.reading import LONGEST_HEADER, within


PEFT_CONFIG = "adapter_config.json"
"""File of PEFT's settings, beside the weights."""

_CONVERTED = "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) makes a plain LoRA of it"
_CHANGES_BASE = {
    "pissa": f"PiSSA, which changes the base; {_CONVERTED}",
    "olora": f"OLoRA, which changes the base; {_CONVERTED}",
    "corda": f"CorDA, which changes the base; {_CONVERTED}",
    "lora_ga": f"LoRA-GA, which changes the base; {_CONVERTED}",
    "loftq": "LoftQ, for a base that it quantised and changed",
}
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
# Settings of PEFT's LoraConfig with which a layer's change is not alpha / rank * up @ down.
_REFUSED = {
    "use_dora": "DoRA, whose effect is not a low-rank update",
    "bias": "trained biases",
    "lora_bias": "biases on the updates",
    "modules_to_save": "fully trained layers",
    "trainable_token_indices": "trained embeddings of tokens",
    "target_parameters": "updates of parameters that are not layers",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "aLoRA, which is active only from some token on",
    "use_qalora": "QALoRA, which pools features",
    "use_bdlora": "BD-LoRA, whose halves are block-diagonal",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA, which changes the base",
    "monteclora_config": "MonteCLoRA, which samples its updates",
}
# Patterns are untrusted regular expressions: those that could backtrack for ever are not matched.
_PLAIN = re.compile(r"\^?([\w.-]|\\[.-])+")
_REPEATED = re.compile(r"\)[*+{]")
_MOST_EXPRESSIONS = 16
_LONGEST_NAME = 96
"""Longest layer name that expressions are matched with; those of Stable Diffusion have some 70 characters."""
_LONGEST_EXPRESSION = 256
_MOST_TRIES = 9 * 64**2
"""Limit for the estimated match attempts of all expressions together: nine expressions with two repeats each."""
_LARGEST = 1e30


class _Patterns:
    """Values for the layers whose names match regular expressions, by PEFT's own rule."""

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        self._values = dict(values or {})
        self._expressions = [pattern for pattern in self._values if not _PLAIN.fullmatch(pattern)]
        # PEFT's function compiles every pattern for every layer, which is slow for hundreds of both. Plain names,
        # whose dots match any character, are therefore looked up by their last part.
        self._names: dict[str, list[tuple[str, str]]] = {}
        for pattern in self._values.keys() - set(self._expressions):
            name = re.sub(r"[\^\\]", "", pattern)
            self._names.setdefault(name.rpartition(".")[2], []).append((name[::-1], pattern))

    def matching(self, path: str) -> list[float]:
        """The distinct values for a layer, the one that PEFT uses first; empty if no pattern matches."""
        if not self._values:
            return []
        from peft.utils.other import get_pattern_key  # takes seconds, and most files need none of it

        found: list[float] = []
        for name in dict.fromkeys((path, path.removeprefix("text_model."))):
            candidates = {*(self._expressions if len(name) <= _LONGEST_NAME else ()), *self._find_plain(name)}
            left = [pattern for pattern in self._values if pattern in candidates] if candidates else []
            while (key := get_pattern_key(left, name)) in left:
                found.append(self._values[key])
                left = left[left.index(key) + 1 :]
        return list(dict.fromkeys(found))

    def _find_plain(self, path: str) -> Iterable[str]:
        last, backwards = path.rpartition(".")[2], path[::-1]
        for start in range(len(last) + 1):
            for name, pattern in self._names.get(last[start:], ()):
                if all(one in (".", other) for one, other in zip(name, backwards, strict=False)):
                    yield pattern


@dataclass(frozen=True, kw_only=True)
class _Component:
    """Settings of one component's layers."""

    rank: float | None = None
    alpha: float | None = None
    rank_pattern: _Patterns = field(default_factory=_Patterns)
    alpha_pattern: _Patterns = field(default_factory=_Patterns)
    rslora: bool = False


@dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """PEFT's settings for a file of weights.

    Args:
        place: Where they were found, for messages; empty if there are none.
        components: Component to its settings; the empty name stands for all.
        defects: Settings that cannot be read or are not supported.
    """

    place: str = ""
    components: Mapping[str, _Component] = field(default_factory=dict)
    defects: tuple[str, ...] = ()

    def alpha(self, site: str, rank: int) -> float | None:
        """The alpha of a layer, such that alpha / rank is its scaling; None if the settings have none.

        Args:
            site: The layer, see `families.family`.
            rank: Rank of its update.
        """
        said, path = self._of(site)
        alpha = next(iter(said.alpha_pattern.matching(path)), said.alpha)
        return alpha * math.sqrt(rank) if alpha is not None and said.rslora else alpha

    def ambiguous(self, sites: Iterable[str]) -> list[str]:
        """Sites for which patterns give different alphas: PEFT sorts patterns in files, so their order is lost."""
        told = [(site, *self._of(site)) for site in sites]
        return [site for site, said, path in told if len(said.alpha_pattern.matching(path)) > 1]

    def misfits(self, ranks: Mapping[str, int]) -> list[str]:
        """One defect if the settings have other ranks than the layers, so belong to another LoRA; else empty."""
        wrong = []
        for site, rank in ranks.items():
            said, path = self._of(site)
            if rank not in (said.rank_pattern.matching(path) or [said.rank or rank]):
                wrong.append(site)
        return [f"{self.place} has other ranks than these layers: {list_names(wrong)}"] if wrong else []

    def _of(self, site: str) -> tuple[_Component, str]:
        component, _, path = site.partition(".")
        return self.components.get(component) or self.components.get("") or _Component(), path


def settings_in_header(metadata: Mapping[str, str]) -> PeftSettings | None:
    """The settings that diffusers wrote into a file's header; None if there are none."""
    return _parse(f"{stock.KEY} in its header", metadata[stock.KEY]) if stock.KEY in metadata else None


def settings_beside(path: Path) -> PeftSettings:
    """The settings in PEFT's file beside a file of weights; empty ones if there is none."""
    beside = within(path.parent, PEFT_CONFIG)
    if not beside.is_file():
        return PeftSettings()
    try:
        with beside.open("rb") as file:
            text = file.read(LONGEST_HEADER).decode(errors="replace")
    except OSError:
        text = ""
    return _parse(f"{PEFT_CONFIG} beside it", text)


def _parse(place: str, text: str) -> PeftSettings:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        return PeftSettings(place=place, defects=(f"{place} cannot be read as a JSON object",))
    by_component: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        component, _, key = name.rpartition(".")
        by_component.setdefault(component, {})[key] = value
    found = {component: _component(said) for component, said in by_component.items()}
    defects = dict.fromkeys(f"{place}: {defect}" for _, told in found.values() for defect in told)
    return PeftSettings(
        place=place, components={name: said for name, (said, _) in found.items()}, defects=tuple(defects)
    )


def _component(said: Mapping[str, Any]) -> tuple[_Component, list[str]]:
    """Settings of one component, and their defects."""
    defects = [
        f"{told} ({key})" for key, told in _REFUSED.items() if said.get(key) not in (None, "none", False, [], {})
    ]
    defects += _of_another_kind(said)
    numbers: dict[str, float | None] = {}
    for key in ("r", "lora_alpha"):
        numbers[key] = _number(said.get(key))
        if said.get(key) is not None and numbers[key] is None:
            defects.append(f"{key} is not a number")
    patterns: dict[str, _Patterns] = {}
    for key in ("rank_pattern", "alpha_pattern"):
        given = said.get(key) or {}
        given = given if isinstance(given, dict) else {"": None}
        sound = _keep_usable(given)
        patterns[key] = _Patterns(sound)
        if odd := [name for name in given if name not in sound]:
            defects.append(f"{key} has unusable entries: {list_names(odd)}{_explain_limits(odd)}")
    found = _Component(rank=numbers["r"], alpha=numbers["lora_alpha"], rslora=bool(said.get("use_rslora")), **patterns)
    return found, defects


def _of_another_kind(said: Mapping[str, Any]) -> list[str]:
    defects = []
    method, start = said.get("peft_type") or "LORA", str(said.get("init_lora_weights", True)).lower()
    if method != "LORA":
        defects.append(f"{sanitise(str(method))}, another method of PEFT than LoRA")
    if told := next((told for name, told in _CHANGES_BASE.items() if start.startswith(name)), ""):
        defects.append(f"initialised by {told}")
    elif start not in _KEEPS_BASE and start != "none":
        defects.append(f"initialised by an unknown method, which may change the base: {sanitise(start)}")
    return defects


def _keep_usable(patterns: Mapping[str, object]) -> dict[str, float]:
    """The entries with a number and a valid pattern, as long as all expressions together stay within the limits."""
    sound, expressions, tries = {}, 0, 0
    for pattern, value in patterns.items():
        if not _PLAIN.fullmatch(pattern):
            expressions += 1
            tries += _estimate_tries(pattern)
            if expressions > _MOST_EXPRESSIONS or tries > _MOST_TRIES or not _is_expression(pattern):
                tries -= _estimate_tries(pattern)
                continue
        if (number := _number(value)) is not None:
            sound[pattern] = number
    return sound


def _estimate_tries(pattern: str) -> int:
    """Estimate, to an order of magnitude, the attempts that matching an expression with a name may take."""
    if len(pattern) > _LONGEST_EXPRESSION or _REPEATED.search(pattern):
        return _MOST_TRIES + 1
    repeats, choices = (sum(map(pattern.count, signs)) for signs in ("*+{", "?|"))
    return int(min(64.0**repeats * 3.0**choices, _MOST_TRIES + 1))


def _is_expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _explain_limits(odd: Iterable[str]) -> str:
    """The limits of expressions, if one is among the unusable patterns; else empty."""
    if all(map(_PLAIN.fullmatch, odd)):
        return ""
    return (
        f"; at most {_MOST_EXPRESSIONS} regular expressions are matched, of up to {_LONGEST_EXPRESSION} characters "
        "and with few repeats (*, +, {) and choices (?, |), as others could take for ever. Use plain layer names"
    )


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > _LARGEST:
        return None
    return float(value)
