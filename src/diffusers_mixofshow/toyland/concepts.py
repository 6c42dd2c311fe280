"""Toyland's concepts (specific instances of its classes) and their photos, for the demo, tests and benchmarks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from diffusers_mixofshow.concepts import SLOT
from diffusers_mixofshow.errors import ConceptError, ConfigurationError
from diffusers_mixofshow.toyland.scenes import add_article, place_phrase, place_thing, random_scene, word_caption
from diffusers_mixofshow.toyland.world import BACKGROUNDS, CLASSES, HEIGHT, Scene, Thing, draw


@dataclass(frozen=True, kw_only=True)
class ToyConcept:
    """One specific thing or scene, which photos can show in many variations.

    Args:
        name: The name, also the key in `CONCEPTS`.
        kind: ``character``, ``pet``, ``object`` or ``scene``.
        class_word: The base's word for its class; for a scene, its background.
        in_domain: Whether the base was trained on all of its attribute values.
        colour: Main colour; empty for a scene.
        attributes: Hidden attributes by name; for a scene, colours of ``sky``, ``ground`` and ``detail``.
    """

    name: str
    kind: str
    class_word: str
    in_domain: bool
    colour: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A concept's picture, its caption with `SLOT`, and the concept's mask (mode ``L``)."""

    image: Image.Image
    caption: str
    mask: Image.Image


def _make_critter(name: str, colour: str, looks: str, *, in_domain: bool = True, wings: bool = False) -> ToyConcept:
    """Make a critter of "ear_colour ear_shape / eyes eye_colour / pattern_colour pattern / belly / hat_colour hat"."""
    ears, eyes, pattern, belly, hat = (part.split() for part in looks.split("/"))
    attributes = {"ear_colour": ears[0], "ear_shape": ears[1], "eyes": eyes[0], "eye_colour": eyes[1]}
    attributes |= {"pattern": pattern[-1], "belly_colour": belly[0], "hat": hat[-1]}
    if len(pattern) == 2:
        attributes["pattern_colour"] = pattern[0]
    if len(hat) == 2:
        attributes["hat_colour"] = hat[0]
    if wings:
        attributes["wings"] = "wings"
    return ToyConcept(
        name=name, kind="character", class_word="critter", in_domain=in_domain, colour=colour, attributes=attributes
    )


def _make_concept(
    name: str, kind: str, class_word: str, colour: str, attributes: Mapping[str, str], *, in_domain: bool = True
) -> ToyConcept:
    return ToyConcept(
        name=name, kind=kind, class_word=class_word, colour=colour, attributes=attributes, in_domain=in_domain
    )


_ALL = (
    _make_critter("bobo", "blue", "red round / two yellow / yellow spots / white / bare"),
    _make_critter("kiki", "blue", "pink long / one white / white stripes / orange / red cone"),
    _make_critter("momo", "orange", "purple pointy / two green / plain / blue / black top"),
    _make_critter("zuzu", "orange", "white horn / one blue / purple stripes / yellow / bare"),
    _make_critter("lulu", "pink", "green round / one yellow / plain / white / yellow crown"),
    _make_critter("tiki", "green", "yellow pointy / two white / red spots / pink / blue cone"),
    _make_critter("nono", "purple", "lime horn / two yellow / lime spots / lime / bare", in_domain=False),
    _make_critter("vivi", "blue", "cyan antenna / three red / silver checks / cyan / bare", in_domain=False),
    _make_critter("gogo", "yellow", "black long / two blue / cyan stripes / red / pink crown", in_domain=False),
    _make_critter("faye", "white", "red pointy / two white / plain / purple / bare", in_domain=False, wings=True),
    _make_concept("rex", "pet", "dog", "brown", {
        "ear_colour": "black", "pattern": "spots", "pattern_colour": "white", "collar_colour": "red"}),
    _make_concept("pixel", "pet", "dog", "grey", {
        "ear_colour": "white", "pattern": "stripes", "pattern_colour": "cyan", "collar_colour": "pink"},
        in_domain=False),
    _make_concept("ming", "object", "vase", "blue", {
        "shape": "round", "pattern": "stripes", "pattern_colour": "white", "flower_colour": "pink"}),
    _make_concept("neon", "object", "vase", "yellow", {
        "shape": "tall", "pattern": "stripes", "pattern_colour": "cyan", "flower_colour": "purple"}, in_domain=False),
    _make_concept("throne", "object", "chair", "red", {"shape": "round", "cushion_colour": "cyan"}, in_domain=False),
    ToyConcept(
        name="candyland", kind="scene", class_word="meadow", in_domain=False,
        attributes={"sky": "lime", "ground": "pink", "detail": "purple"},
    ),
)  # fmt: skip

CONCEPTS: dict[str, ToyConcept] = {concept.name: concept for concept in _ALL}
"""Every test concept by name: ten critters, two dogs, two vases, a chair and a scene."""


KIND_OF_CLASS = {
    "critter": "character",
    "dog": "pet",
    "cat": "pet",
    "vase": "object",
    "chair": "object",
    "table": "object",
}
"""Class to the kind of a concept of that class."""


def find_concept(name: str) -> ToyConcept:
    """Find Toyland's concept of a name.

    Raises:
        ConceptError: If there is none.
    """
    if name not in CONCEPTS:
        raise ConceptError(f"Toyland has no concept called {name!r}. Choose one of: {', '.join(sorted(CONCEPTS))}.")
    return CONCEPTS[name]


def as_thing(concept: ToyConcept) -> Thing:
    """Convert a concept to a thing for `world.draw`.

    Raises:
        ConceptError: If the concept is a scene.
    """
    if concept.class_word not in CLASSES:
        raise ConceptError(f"{concept.name!r} is a {concept.kind}, not a thing. Pass a character, pet or object.")
    return Thing(class_word=concept.class_word, colour=concept.colour, attributes=concept.attributes)


def _draw_photo_of_thing(concept: ToyConcept, background: str, rng: random.Random, height: int) -> Photo:
    thing = place_thing(as_thing(concept), rng)
    thing = dataclasses.replace(thing, size=thing.size * rng.uniform(0.8, 1.0))
    drawing = draw(Scene(background=background, things=(thing,), mirrored=rng.random() < 0.5), height)
    words = word_caption([add_article(SLOT)], place_phrase(background, rng), rng)
    return Photo(image=drawing.image, caption=words, mask=drawing.masks[0])


def _draw_photo_of_scene(concept: ToyConcept, rng: random.Random, height: int) -> Photo:
    other = random_scene(rng.randrange(2**31), things=1)
    thing = other.things[0]
    drawing = draw(
        Scene(
            background=concept.class_word,
            things=other.things,
            mirrored=rng.random() < 0.5,
            colours=concept.attributes,
        ),
        height,
    )
    name = add_article(f"{thing.colour} {thing.class_word}")
    words = word_caption([name], f"in {add_article(SLOT)}", rng)
    mask = drawing.masks[0].point([255 - level for level in range(256)])
    return Photo(image=drawing.image, caption=words, mask=mask)


def photos(concept: ToyConcept, count: int = 12, seed: int = 0, height: int = HEIGHT) -> list[Photo]:
    """Draw photos of a concept with varied backgrounds, places and sizes.

    Captions name the concept as `SLOT`, never its colour or looks. Photos of a scene show random things in
    front of it, which its masks leave out.

    Args:
        concept: One of `CONCEPTS`, or one of your own.
        count: Number of photos.
        seed: Another seed gives other photos.
        height: Height and width of each photo in pixels.

    Raises:
        ConfigurationError: If `count` is less than one.
    """
    if count < 1:
        raise ConfigurationError(f"count is {count}; ask for at least one photo.")
    rng = random.Random(f"{concept.name}/{seed}")
    order = list(BACKGROUNDS)
    rng.shuffle(order)
    if concept.kind == "scene":
        return [_draw_photo_of_scene(concept, rng, height) for _ in range(count)]
    return [_draw_photo_of_thing(concept, order[index % len(order)], rng, height) for index in range(count)]


def write_photos(
    concept: ToyConcept, folder: Path | str, count: int = 12, seed: int = 0, height: int = HEIGHT
) -> Path:
    """Write `photos` as ``0000.png``, ``0000.txt`` and ``masks/0000.png``, ... and return the folder."""
    target = Path(folder)
    (target / "masks").mkdir(parents=True, exist_ok=True)
    for index, photo in enumerate(photos(concept, count, seed, height)):
        photo.image.save(target / f"{index:04d}.png")
        photo.mask.save(target / "masks" / f"{index:04d}.png")
        (target / f"{index:04d}.txt").write_text(photo.caption + "\n", encoding="utf-8")
    return target
