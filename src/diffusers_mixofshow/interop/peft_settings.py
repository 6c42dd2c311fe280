"""PEFT's settings of a LoRA: where they lie, which scaling they give, and what of them no low-rank update can say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers_mixofshow.edlora import stock
from diffusers_mixofshow.edlora.defects import listed, shown
from diffusers_mixofshow.edlora.reading import LONGEST_HEADER, within


PEFT_CONFIG = "adapter_config.json"
"""Where PEFT writes its settings, beside the weights."""

_CONVERTED = "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) makes an ordinary LoRA of it"
_CHANGES_BASE = {
    "pissa": f"PiSSA, which changes the base; {_CONVERTED}",
    "olora": f"OLoRA, which changes the base; {_CONVERTED}",
    "corda": f"CorDA, which changes the base; {_CONVERTED}",
    "lora_ga": f"LoRA-GA, which changes the base; {_CONVERTED}",
    "loftq": "LoftQ, for a base that it quantised and changed",
}
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
# Settings of PEFT's LoraConfig with which a layer's change is not the scaled product of its halves.
_REFUSED = {
    "use_dora": "DoRA, whose effect is no low-rank update",
    "bias": "trained biases",
    "lora_bias": "biases on the updates",
    "modules_to_save": "whole layers that were trained",
    "trainable_token_indices": "trained embeddings of tokens",
    "target_parameters": "updates of parameters that are no layers",
    "layer_replication": "layers that are repeated",
    "alora_invocation_tokens": "aLoRA, which acts from some token on",
    "use_qalora": "QALoRA, which pools features",
    "use_bdlora": "BD-LoRA, whose halves are block-diagonal",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA, which changes the base",
    "monteclora_config": "MonteCLoRA, which samples its updates",
}
# Patterns are regular expressions of strangers: what could take for ever on a layer's name is not tried.
_PLAIN = re.compile(r"\^?([\w.-]|\\[.-])+")
_REPEATED = re.compile(r"\)[*+{]")
_MOST_EXPRESSIONS = 16
_LONGEST_NAME = 96
"""Letters of a layer's name; those of Stable Diffusion have some 70. No expression is tried on a longer one."""
_LONGEST_EXPRESSION = 256
_MOST_TRIES = 9 * 64**2
"""Ways to match a name that all expressions have together: as many as nine that repeat twice."""
_LARGEST = 1e30


class _Patterns:
    """Values for the layers whose names match regular expressions, by PEFT's own rule."""

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        self._values = dict(values or {})
        self._expressions = [pattern for pattern in self._values if not _PLAIN.fullmatch(pattern)]
        # PEFT's function compiles every pattern anew for every layer, and a file of hundreds of layers can have as
        # many. Plain names, in which a dot stands for any letter, are found by their last letters.
        self._names: dict[str, list[tuple[str, str]]] = {}
        for pattern in self._values.keys() - set(self._expressions):
            name = re.sub(r"[\^\\]", "", pattern)
            self._names.setdefault(name.rpartition(".")[2], []).append((name[::-1], pattern))

    def matching(self, path: str) -> list[float]:
        """The different values for a layer, first that which PEFT takes; none if no pattern matches."""
        if not self._values:
            return []
        from peft.utils.other import get_pattern_key  # takes seconds, and most files need none of it

        found: list[float] = []
        for name in dict.fromkeys((path, path.removeprefix("text_model."))):
            candidates = {*(self._expressions if len(name) <= _LONGEST_NAME else ()), *self._alike(name)}
            left = [pattern for pattern in self._values if pattern in candidates] if candidates else []
            while (key := get_pattern_key(left, name)) in left:
                found.append(self._values[key])
                left = left[left.index(key) + 1 :]
        return list(dict.fromkeys(found))

    def _alike(self, path: str) -> Iterable[str]:
        last, backwards = path.rpartition(".")[2], path[::-1]
        for start in range(len(last) + 1):
            for name, pattern in self._names.get(last[start:], ()):
                if all(one in (".", other) for one, other in zip(name, backwards, strict=False)):
                    yield pattern


@dataclass(frozen=True, kw_only=True)
class _Component:
    """What is said of one component's layers."""

    rank: float | None = None
    alpha: float | None = None
    rank_pattern: _Patterns = field(default_factory=_Patterns)
    alpha_pattern: _Patterns = field(default_factory=_Patterns)
    rslora: bool = False


@dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """The settings that belong to a file of weights.

    Args:
        place: Where they stand, as messages call it; empty if there are none.
        components: Component to what is said of it; the empty name stands for all.
        defects: What of them cannot be read, or no low-rank update can say.
    """

    place: str = ""
    components: Mapping[str, _Component] = field(default_factory=dict)
    defects: tuple[str, ...] = ()

    def alpha(self, site: str, rank: int) -> float | None:
        """The alpha for which alpha / rank is the scaling of a layer, or None where nothing is said of it.

        Args:
            site: The layer, see `families.family`.
            rank: Of its update.
        """
        said, path = self._of(site)
        alpha = next(iter(said.alpha_pattern.matching(path)), said.alpha)
        return alpha * math.sqrt(rank) if alpha is not None and said.rslora else alpha

    def ambiguous(self, sites: Iterable[str]) -> list[str]:
        """The sites whose alphas several patterns tell differently: in files they stand sorted, not as in training."""
        told = [(site, *self._of(site)) for site in sites]
        return [site for site, said, path in told if len(said.alpha_pattern.matching(path)) > 1]

    def misfits(self, ranks: Mapping[str, int]) -> list[str]:
        """The defect of settings that are another LoRA's, by the rank of each site; none if they fit."""
        wrong = []
        for site, rank in ranks.items():
            said, path = self._of(site)
            if rank not in (said.rank_pattern.matching(path) or [said.rank or rank]):
                wrong.append(site)
        return [f"{self.place} tells of other ranks than these layers have: {listed(wrong)}"] if wrong else []

    def _of(self, site: str) -> tuple[_Component, str]:
        component, _, path = site.partition(".")
        return self.components.get(component) or self.components.get("") or _Component(), path


def settings_in_header(metadata: Mapping[str, str]) -> PeftSettings | None:
    """The settings that diffusers wrote into a file's header, whatever its tensors are called; None without any."""
    return _parse(f"{stock.KEY} in its header", metadata[stock.KEY]) if stock.KEY in metadata else None


def settings_beside(path: Path) -> PeftSettings:
    """The settings in PEFT's own file beside a file of weights."""
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
    """The settings of one component, and what of them is defective."""
    defects = [
        f"{told} ({key})" for key, told in _REFUSED.items() if said.get(key) not in (None, "none", False, [], {})
    ]
    defects += _of_another_kind(said)
    numbers: dict[str, float | None] = {}
    for key in ("r", "lora_alpha"):
        numbers[key] = _number(said.get(key))
        if said.get(key) is not None and numbers[key] is None:
            defects.append(f"{key} is no number")
    patterns: dict[str, _Patterns] = {}
    for key in ("rank_pattern", "alpha_pattern"):
        given = said.get(key) or {}
        given = given if isinstance(given, dict) else {"": None}
        sound = _sound(given)
        patterns[key] = _Patterns(sound)
        if odd := [name for name in given if name not in sound]:
            defects.append(f"{key} is not understood: {listed(odd)}{_bounds(odd)}")
    found = _Component(rank=numbers["r"], alpha=numbers["lora_alpha"], rslora=bool(said.get("use_rslora")), **patterns)
    return found, defects


def _of_another_kind(said: Mapping[str, Any]) -> list[str]:
    defects = []
    method, start = said.get("peft_type") or "LORA", str(said.get("init_lora_weights", True)).lower()
    if method != "LORA":
        defects.append(f"{shown(str(method))}, another method of PEFT than LoRA")
    if told := next((told for name, told in _CHANGES_BASE.items() if start.startswith(name)), ""):
        defects.append(f"initialised by {told}")
    elif start not in _KEEPS_BASE and start != "none":
        defects.append(f"initialised in a way that is not known here, and may change the base: {shown(start)}")
    return defects


def _sound(patterns: Mapping[str, object]) -> dict[str, float]:
    """Those entries that have a number, and an expression that is quickly matched, beside those before it."""
    sound, expressions, tries = {}, 0, 0
    for pattern, value in patterns.items():
        if not _PLAIN.fullmatch(pattern):
            expressions += 1
            tries += _tries(pattern)
            if expressions > _MOST_EXPRESSIONS or tries > _MOST_TRIES or not _is_expression(pattern):
                tries -= _tries(pattern)
                continue
        if (number := _number(value)) is not None:
            sound[pattern] = number
    return sound


def _tries(pattern: str) -> int:
    """In how many ways an expression may have to be tried on a name, in the order of magnitude."""
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


def _bounds(odd: Iterable[str]) -> str:
    """What expressions must keep to, where one is among the patterns that were not understood."""
    if all(map(_PLAIN.fullmatch, odd)):
        return ""
    return (
        f"; of a stranger's expressions up to {_MOST_EXPRESSIONS} are matched, of up to {_LONGEST_EXPRESSION} letters "
        "and with few repeats (*, +, {) and choices (?, |) in all, as others could take for ever. Name layers plainly"
    )


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > _LARGEST:
        return None
    return float(value)
