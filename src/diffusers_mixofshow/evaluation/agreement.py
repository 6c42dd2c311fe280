"""One class word and kind for each concept, where several packs hold it and tell it differently, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConfigurationError, warn
from diffusers_mixofshow.interop.concept_names import UNKNOWN_CLASS


def own_packs(packs: Mapping[str, EDLoRA]) -> dict[str, str]:
    """Placeholder to the name of its own ED-LoRA: the first that holds the concept alone."""
    own: dict[str, str] = {}
    for name, pack in packs.items():
        if len(pack.concepts) == 1:
            own.setdefault(pack.concepts[0].placeholder, name)
    return own


def warn_of_concepts_spelt_alike(packs: Mapping[str, EDLoRA]) -> None:
    """Warn of concepts whose names differ in case alone: what a pack keeps of one is not held against the other."""
    spelt: dict[str, dict[str, None]] = {}
    for pack in packs.values():
        for concept in pack.concepts:
            spelt.setdefault(concept.placeholder.casefold(), {})[concept.placeholder] = None
    if alike := [" and ".join(names) for names in spelt.values() if len(names) > 1]:
        warn(f"{'; '.join(alike)} are measured as different concepts.")


def unify_concepts(
    packs: Mapping[str, EDLoRA],
    class_words: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, EDLoRA]:
    """Give every concept the same class word and kind in all packs, so that they are measured with the same prompts.

    A concept takes both from its own ED-LoRA; where that does not know its class word, or there is none, from the
    first pack that does. What is given here wins over all. One warning tells of packs that differ.

    Args:
        packs: Name to pack.
        class_words: Placeholder to class word.
        kinds: Placeholder to kind.

    Returns:
        Name to pack; the packs given stay as they are.

    Raises:
        ConfigurationError: If no pack knows the class word of a concept; names all of them.
    """
    class_words, kinds = class_words or {}, kinds or {}
    chosen: dict[str, Concept] = {}
    unknown, remarks = [], []
    for placeholder, told in _collect_told(packs).items():
        known = {name: concept for name, concept in told.items() if concept.class_word != UNKNOWN_CLASS}
        source = next(iter(known or told))
        word, kind = class_words.get(placeholder), kinds.get(placeholder)
        if word is None and not known:
            unknown.append(f"{placeholder} ({', '.join(told)})")
        remarks += _list_differences(placeholder, told, source, word=word is None, kind=kind is None)
        own = told[source]
        chosen[placeholder] = replace(own, class_word=word or own.class_word, kind=kind or own.kind)
    if unknown:
        raise ConfigurationError(
            f"No class word is known of {', '.join(unknown)}: files of other programs do not tell it, and retention "
            f"is counted from it. Give it: --class-word {unknown[0].split()[0][1:-1]}=WORD."
        )
    if remarks:
        warn("; ".join(remarks) + ".")
    return {name: _with_concepts(pack, chosen) for name, pack in packs.items()}


def _collect_told(packs: Mapping[str, EDLoRA]) -> dict[str, dict[str, Concept]]:
    """Placeholder to what each pack tells of it, by the pack's name; its own ED-LoRA first."""
    own = own_packs(packs)
    told: dict[str, dict[str, Concept]] = {}
    for name, pack in packs.items():
        for concept in pack.concepts:
            told.setdefault(concept.placeholder, {})[name] = concept
    return {
        placeholder: dict(sorted(every.items(), key=lambda entry: entry[0] != own.get(placeholder)))
        for placeholder, every in told.items()
    }


def _list_differences(
    placeholder: str, told: Mapping[str, Concept], source: str, *, word: bool, kind: bool
) -> list[str]:
    """A remark on the packs whose class word or kind differs from the one that is used; nothing if none does."""
    said = {name: _describe(concept, word=word, kind=kind) for name, concept in told.items()}
    used = said[source]
    others = [f"{name} tells {other}" for name, other in said.items() if other and other != used]
    return [f"{source} tells that {placeholder} is {used}, which is taken; {', '.join(others)}"] if others else []


def _describe(concept: Concept, *, word: bool, kind: bool) -> str:
    """A pack's class word, kind or both, as text; a file without a class word has no kind either."""
    if concept.class_word == UNKNOWN_CLASS:
        return "no class word" if word else ""
    return ", ".join([repr(concept.class_word)] * word + [f"kind {concept.kind}"] * kind)


def _with_concepts(pack: EDLoRA, chosen: Mapping[str, Concept]) -> EDLoRA:
    """The pack, each of its concepts with the class word and kind chosen for it."""
    known = [(concept, chosen[concept.placeholder]) for concept in pack.concepts]
    concepts = tuple(replace(own, class_word=other.class_word, kind=other.kind) for own, other in known)
    return pack if concepts == pack.concepts else replace(pack, concepts=concepts)
