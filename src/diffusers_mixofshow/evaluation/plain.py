"""Plain LoRAs as something to measure: they have no concepts, but act where a prompt says their trigger words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.fusion_record import list_entries
from diffusers_mixofshow.errors import ConfigurationError, warn
from diffusers_mixofshow.interop.concept_names import UNKNOWN_CLASS
from diffusers_mixofshow.interop.trigger_words import trigger_words_of_sources, words_in_training


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """A plain LoRA, alone or among those that a pack was fused from, in the place of a concept.

    Args:
        placeholder: Its name, such as ``dog``, without angle brackets.
        words: What a prompt says to get it, such as ``sks dog``; empty if nobody has told.
        class_word: The plain word for what it draws; `UNKNOWN_CLASS` if nobody has told.
        kind: One of ``character``, ``pet``, ``object``, ``scene``.
    """

    placeholder: str
    words: str
    class_word: str = UNKNOWN_CLASS
    kind: str = "object"

    @property
    def name(self) -> str:
        """The placeholder, which has no brackets."""
        return self.placeholder


Measurable = Concept | Trigger


@dataclass(frozen=True, kw_only=True)
class MeasuredPack:
    """A pack or plain LoRA, and what of it is measured.

    Args:
        pack: What is loaded.
        concepts: Its concepts, and the plain LoRAs that it was fused from.
    """

    pack: EDLoRA
    concepts: tuple[Measurable, ...]

    @classmethod
    def of(cls, pack: EDLoRA, name: str) -> MeasuredPack:
        """Take what can be measured from a pack; a plain LoRA that was not fused from others has the name given."""
        words = trigger_words_of_sources(pack.training)
        if not words and not pack.concepts:
            words = {name: words_in_training(pack.training)}
        triggers = [Trigger(placeholder=each, words=next(iter(told), "")) for each, told in words.items()]
        return cls(pack=pack, concepts=(*pack.concepts, *triggers))


def mention_of(concept: Measurable) -> str:
    """What a prompt says to get a concept: its placeholder, or the trigger words of a plain LoRA."""
    return concept.words if isinstance(concept, Trigger) else concept.placeholder


def has_class_word(concept: Measurable) -> bool:
    """Whether the plain word for what it draws is known."""
    return concept.class_word != UNKNOWN_CLASS


def name_by_records(packs: Mapping[str, MeasuredPack]) -> dict[str, MeasuredPack]:
    """Give each plain LoRA that one of the packs was fused from the name that it has in that pack's record."""
    names = {
        entry.get("digest"): entry["concepts"][0]
        for pack in packs.values()
        for entry in list_entries(pack.pack.training)
        if isinstance(entry.get("concepts"), list) and len(entry["concepts"]) == 1
    }
    named = {}
    for key, pack in packs.items():
        only = pack.concepts[0]
        alone = len(pack.concepts) == 1 and isinstance(only, Trigger) and not list_entries(pack.pack.training)
        name = names.get(pack.pack.digest) if alone else None
        named[key] = replace(pack, concepts=(replace(only, placeholder=name),)) if isinstance(name, str) else pack
    return named


def settle_words(packs: Mapping[str, MeasuredPack], given: Mapping[str, str] | None = None) -> dict[str, MeasuredPack]:
    """Give each plain LoRA the same trigger words in all packs, so that it is measured with the same prompts.

    Args:
        packs: Name to pack.
        given: Name of a plain LoRA to its trigger words; replaces those that packs and files tell.

    Raises:
        ConfigurationError: If nothing of a pack can be measured; names all LoRAs whose trigger words are not known.

    Warns:
        MixOfShowWarning: Which LoRAs are left out, as nobody has told their trigger words.
    """
    words: dict[str, str] = {}
    for trigger in _list_triggers(packs.values()):
        if trigger.words:
            words.setdefault(trigger.placeholder, trigger.words)
    words |= given or {}
    settled = {name: _give_words(pack, words) for name, pack in packs.items()}
    unknown = [one.placeholder for one in _list_triggers(packs.values()) if one.placeholder not in words]
    if unknown:
        names = ", ".join(dict.fromkeys(unknown))
        told = f"The trigger words of {names} are not known: the file does not tell them, nor do the prompts share any"
        remedy = f"Give them: --trigger {unknown[0]}=WORDS."
        if not all(pack.concepts for pack in settled.values()):
            raise ConfigurationError(f"{told}. {remedy}")
        warn(f"{told}, so that {names} cannot be measured. {remedy}")
    return settled


def _list_triggers(packs: Iterable[MeasuredPack]) -> list[Trigger]:
    """The plain LoRAs of all packs."""
    return [concept for pack in packs for concept in pack.concepts if isinstance(concept, Trigger)]


def _give_words(pack: MeasuredPack, words: Mapping[str, str]) -> MeasuredPack:
    """The pack with these trigger words, without plain LoRAs that have none."""
    known = [each for each in pack.concepts if not isinstance(each, Trigger) or each.placeholder in words]
    concepts = [replace(each, words=words[each.placeholder]) if isinstance(each, Trigger) else each for each in known]
    return replace(pack, concepts=tuple(concepts))
