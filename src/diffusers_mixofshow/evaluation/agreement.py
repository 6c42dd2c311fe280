"""Choose one class word and kind for each concept where packs that hold it disagree or do not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConfigurationError, warn
from diffusers_mixofshow.evaluation.plain import Measurable, MeasuredPack, Trigger, has_class_word


Packs = Mapping[str, EDLoRA] | Mapping[str, MeasuredPack]
"""Name to pack."""
_Pack = TypeVar("_Pack", EDLoRA, MeasuredPack)


def find_own_packs(packs: Packs) -> dict[str, str]:
    """Placeholder to the name of the concept's own ED-LoRA: the first pack that holds this concept alone."""
    own: dict[str, str] = {}
    for name, pack in packs.items():
        if len(pack.concepts) == 1:
            own.setdefault(pack.concepts[0].placeholder, name)
    return own


def warn_of_concepts_spelt_alike(packs: Packs) -> None:
    """Warn of concepts whose names differ only in case, as they are not compared with each other."""
    spelt: dict[str, dict[str, None]] = {}
    for pack in packs.values():
        for concept in pack.concepts:
            spelt.setdefault(concept.placeholder.casefold(), {})[concept.placeholder] = None
    if alike := [" and ".join(names) for names in spelt.values() if len(names) > 1]:
        warn(f"{'; '.join(alike)} are measured as different concepts.")


def unify_concepts(
    packs: Mapping[str, _Pack],
    class_words: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, _Pack]:
    """Give every concept the same class word and kind in all packs, so that they are measured with the same prompts.

    Both are taken from the concept's own ED-LoRA; if that does not have a class word, or is missing, from the first
    pack that has one. One warning lists packs that differ.

    Args:
        packs: Name to pack.
        class_words: Placeholder to class word; replaces the packs' own.
        kinds: Placeholder to kind; replaces the packs' own.

    Returns:
        Name to pack; the given packs are not changed.

    Raises:
        ConfigurationError: If no pack knows the class word of a concept; names all of them. Plain LoRAs may have
            none.
    """
    class_words, kinds = class_words or {}, kinds or {}
    chosen: dict[str, Measurable] = {}
    unknown, remarks = [], []
    for placeholder, told in _collect_concepts(packs).items():
        known = {name: concept for name, concept in told.items() if has_class_word(concept)}
        source = next(iter(known or told))
        word, kind = class_words.get(placeholder), kinds.get(placeholder)
        own = told[source]
        if word is None and not known and not isinstance(own, Trigger):
            unknown.append(f"{placeholder} ({', '.join(told)})")
        remarks += _list_differences(placeholder, told, source, word=word is None, kind=kind is None)
        chosen[placeholder] = replace(own, class_word=word or own.class_word, kind=kind or own.kind)
    if unknown:
        raise ConfigurationError(
            f"The class word of {', '.join(unknown)} is not known: files of other programs do not have it, and "
            f"retention is measured against it. Give it: --class-word {unknown[0].split()[0][1:-1]}=WORD."
        )
    if remarks:
        warn("; ".join(remarks) + ".")
    return {name: _replace_concepts(pack, chosen) for name, pack in packs.items()}


def _collect_concepts(packs: Packs) -> dict[str, dict[str, Measurable]]:
    """Placeholder to each pack's name and concept, the concept's own ED-LoRA first."""
    own = find_own_packs(packs)
    told: dict[str, dict[str, Measurable]] = {}
    for name, pack in packs.items():
        for concept in pack.concepts:
            told.setdefault(concept.placeholder, {})[name] = concept
    return {
        placeholder: dict(sorted(every.items(), key=lambda entry: entry[0] != own.get(placeholder)))
        for placeholder, every in told.items()
    }


def _list_differences(
    placeholder: str, told: Mapping[str, Measurable], source: str, *, word: bool, kind: bool
) -> list[str]:
    """Write a remark on packs whose class word or kind differs from the chosen one; an empty list if none does."""
    said = {name: _describe(concept, word=word, kind=kind) for name, concept in told.items()}
    used = said[source]
    others = [f"{name} has {other}" for name, other in said.items() if other and other != used]
    return [f"{placeholder} is measured as {used}, as in {source}; {', '.join(others)}"] if others else []


def _describe(concept: Measurable, *, word: bool, kind: bool) -> str:
    """A pack's class word, kind or both, as text; empty for the kind of a file without a class word."""
    if not has_class_word(concept):
        return "no class word" if word else ""
    return ", ".join([repr(concept.class_word)] * word + [f"kind {concept.kind}"] * kind)


def _replace_concepts(pack: _Pack, chosen: Mapping[str, Measurable]) -> _Pack:
    """The pack with the chosen class word and kind of each of its concepts."""
    known = [(concept, chosen[concept.placeholder]) for concept in pack.concepts]
    concepts = tuple(replace(own, class_word=other.class_word, kind=other.kind) for own, other in known)
    return pack if concepts == pack.concepts else replace(pack, concepts=concepts)
