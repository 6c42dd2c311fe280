"""Concepts of studies: those of which plain LoRAs are tuned, and more instances than `concepts.CONCEPTS` has."""

from __future__ import annotations

import random
from collections.abc import Iterator

from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.toyland.concepts import CONCEPTS, KIND_OF_CLASS, ToyConcept
from diffusers_mixofshow.toyland.scenes import random_scene, residents
from diffusers_mixofshow.toyland.world import CLASSES, Thing


PLAIN_LORAS = ("bobo", "kiki", "momo", "zuzu", "lulu", "tiki", "rex", "ming")
"""Names of six critters, a dog and a vase, whose looks the second base was trained on."""

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_LEAST_DIFFERENCES = {"critter": 4, "dog": 2, "cat": 2, "vase": 2, "chair": 1, "table": 1}
_MOST_TRIES = 10_000


def name_before_class(concept: ToyConcept) -> str:
    """The words that a concept's plain LoRA answers to, such as ``bobo critter``."""
    return f"{concept.name} {concept.class_word}"


def random_instances(count: int, seed: int = 0, *, class_word: str | None = None) -> list[ToyConcept]:
    """Things of the training world that are neither test concepts nor residents, as a pure function of the arguments.

    Fewer of them are the first of more. Two of one class differ in several hidden attributes or the main colour, and
    none looks like a test concept or a resident.

    Args:
        count: How many.
        seed: Other seeds give other instances.
        class_word: Of one class only; by default of all, as often as the training world draws them.

    Raises:
        ConfigurationError: If the class is unknown, or has no more instances that differ enough.
    """
    if count < 0 or class_word not in (None, *CLASSES):
        raise ConfigurationError(
            f"Asked for {count} instances of class {class_word!r}; expected 0 or more of one of {', '.join(CLASSES)}."
        )
    rng = random.Random(f"instances/{seed}")
    found: list[ToyConcept] = []
    looks = [_looks(concept.class_word, concept.colour, dict(concept.attributes)) for concept in CONCEPTS.values()]
    known = [_looks(thing.class_word, thing.colour, dict(thing.attributes)) for thing in residents().values()]
    for thing in _things(rng):
        if len(found) == count:
            return found
        own = _looks(thing.class_word, thing.colour, dict(thing.attributes))
        differs = all(_differences(own, other) >= _LEAST_DIFFERENCES[thing.class_word] for other in looks)
        if differs and own not in known and class_word in (None, thing.class_word):
            looks.append(own)
            found.append(_instance(thing, _new_name(rng, {*CONCEPTS, *residents(), *(one.name for one in found)})))
    raise ConfigurationError(
        f"Only {len(found)} of {count} instances of {class_word or 'all classes'} differ enough from each other; ask "
        "for fewer, or for all classes."
    )


def _things(rng: random.Random) -> Iterator[Thing]:
    """Random things without a name, of all classes as the training world draws them."""
    for _ in range(_MOST_TRIES):
        thing = random_scene(rng.randrange(2**31), things=1).things[0]
        if not thing.name:
            yield thing


def _looks(class_word: str, colour: str, attributes: dict[str, str]) -> dict[str, str]:
    return {"class": class_word, "colour": colour, **attributes}


def _differences(ours: dict[str, str], theirs: dict[str, str]) -> int:
    """In how many points two things differ; those of different classes in all."""
    if ours["class"] != theirs["class"]:
        return len(ours)
    return sum(ours.get(name) != theirs.get(name) for name in {*ours, *theirs})


def _new_name(rng: random.Random, taken: set[str]) -> str:
    """Two syllables, such as ``gavu``."""
    while True:
        name = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(2))
        if name not in taken:
            return name


def _instance(thing: Thing, name: str) -> ToyConcept:
    return ToyConcept(
        name=name,
        kind=KIND_OF_CLASS[thing.class_word],
        class_word=thing.class_word,
        in_domain=True,
        colour=thing.colour,
        attributes=dict(thing.attributes),
    )
