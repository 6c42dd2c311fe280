"""Training scenes of Toyland: random scenes, residents (named things), and captions that hide identity.

A caption names classes, main colours, the background and who stands where. Hidden attributes (ears, eyes, pattern,
belly, hat, ...) are never named, so that a particular critter can only be learnt from its photos.

As a large model knows many people and characters by name, Toyland has residents: fixed things with names of their own.
Their names teach the text encoder and the U-Net words that stand for a whole appearance. So there is a space of
embeddings in which those of a new concept can find whatever the base can already draw (paper, section 3.2). No concept
of `concepts.CONCEPTS` is a resident.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Mapping, Sequence

from diffusers_mixofshow.toyland.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    CLASSES,
    HEIGHT,
    MAIN_COLOURS,
    WIDE,
    WIDTH_OF_HEIGHT,
    Scene,
    Thing,
)


_PLACES = {
    "meadow": ("in a meadow", "in the meadow", "on a meadow"),
    "beach": ("on a beach", "at the beach", "on the beach"),
    "desert": ("in a desert", "in the desert"),
    "snow": ("in the snow", "in snow"),
    "night": ("at night", "in the night"),
    "room": ("in a room", "in the room"),
}

_WORDINGS = {
    1: ("{0} {p}", "{0} {p}", "a picture of {0} {p}", "a photo of {0} {p}", "{0}, {p}", "there is {0} {p}"),
    2: (
        "{0} on the left and {1} on the right {p}",
        "{0} on the left, {1} on the right, {p}",
        "{0} left of {1} {p}",
        "{1} right of {0} {p}",
        "{0} and {1} {p}",
        "two things {p}: {0} and {1}",
    ),
    3: (
        "{0}, {1} and {2} {p}",
        "{0} on the left, {1} in the middle and {2} on the right {p}",
        "three things {p}: {0}, {1} and {2}",
    ),
}
"""Number of things in a scene to the wordings of its caption."""

_CLASS_SHARES = {"critter": 0.34, "dog": 0.14, "cat": 0.12, "vase": 0.15, "chair": 0.13, "table": 0.12}

RESIDENTS_OF_CLASS = {"critter": 192, "dog": 48, "cat": 40, "vase": 40, "chair": 24, "table": 24}
"""Class to the number of its residents."""

_RESIDENT_SHARE = 0.5

_COMPANIES = {"strangers": 0.5, "kin": 0.25, "twins": 0.25}
"""Probability that several things of one scene are drawn independently, are of one class, or look the same."""

_SYLLABLES = tuple(first + vowel for first in "bdfgjklmnprstvwz" for vowel in "aeiou")


def _random_look(class_word: str, rng: random.Random) -> Thing:
    """Draw a random thing of a class, without a name."""
    colour = rng.choice(MAIN_COLOURS[class_word])
    attributes = {name: rng.choice(values) for name, values in ATTRIBUTES[class_word].items()}
    if attributes.get("pattern") == "plain":
        del attributes["pattern_colour"]
    elif "pattern_colour" in attributes:
        others = [value for value in ATTRIBUTES[class_word]["pattern_colour"] if value != colour]
        attributes["pattern_colour"] = rng.choice(others)
    if attributes.get("hat") == "bare":
        del attributes["hat_colour"]
    return Thing(class_word=class_word, colour=colour, attributes=attributes)


@functools.cache
def residents() -> Mapping[str, Thing]:
    """The residents by name, the same in every process and release."""
    rng = random.Random("residents")
    named: dict[str, Thing] = {}
    for class_word in CLASSES:
        for _ in range(RESIDENTS_OF_CLASS[class_word]):
            name = ""
            while not name or name in named:
                name = "".join(rng.sample(_SYLLABLES, 2)) + rng.choice("bdgklmnprstxz")
            named[name] = dataclasses.replace(_random_look(class_word, rng), name=name)
    return named


@functools.cache
def _residents_of(class_word: str) -> tuple[Thing, ...]:
    return tuple(thing for thing in residents().values() if thing.class_word == class_word)


def _random_class(rng: random.Random) -> str:
    return rng.choices(list(_CLASS_SHARES), list(_CLASS_SHARES.values()))[0]


def _random_thing(class_word: str, rng: random.Random) -> Thing:
    """Draw a thing of a class, with probability one half a resident."""
    if rng.random() < _RESIDENT_SHARE:
        return rng.choice(_residents_of(class_word))
    return _random_look(class_word, rng)


def _random_company(count: int, rng: random.Random) -> list[Thing]:
    """Draw the things of one scene; by chance alone, too few scenes would be of one class (three things: 4 %)."""
    first = _random_thing(_random_class(rng), rng)
    if count == 1:
        return [first]
    company = rng.choices(list(_COMPANIES), list(_COMPANIES.values()))[0]
    if company == "twins":
        return [first] * count
    others = [_random_class(rng) if company == "strangers" else first.class_word for _ in range(count - 1)]
    return [first, *(_random_thing(class_word, rng) for class_word in others)]


def place_thing(thing: Thing, rng: random.Random, *, slot: int = 0, slots: int = 1, width: int = HEIGHT) -> Thing:
    """Place a thing at a random position and size inside one of the picture's equal columns.

    Args:
        thing: The thing.
        rng: Draws position and size.
        slot: Index of the column, from the left.
        slots: Number of columns.
        width: Width of the picture in pixels.
    """
    column = width / HEIGHT / slots
    wanted = rng.uniform(0.72, 0.92) if slots == 1 else rng.uniform(0.5, 0.62)
    size = min(wanted, 0.97 * column / WIDTH_OF_HEIGHT[thing.class_word])
    slack = max(0.0, column - size * WIDTH_OF_HEIGHT[thing.class_word]) / 2
    shift = rng.uniform(-slack, slack) * (0.7 if slots == 1 else 0.9)
    centre = ((slot + 0.5) * column + shift) * HEIGHT / width
    ground = rng.uniform(0.9, 0.97) if slots == 1 else rng.uniform(0.84, 0.95)
    return dataclasses.replace(thing, centre=centre, ground=ground, size=size)


def random_scene(seed: int, *, things: int | None = None) -> Scene:
    """Draw a scene of the training world, as a pure function of `seed`.

    Args:
        seed: The seed.
        things: Number of things, one to three; by default one (70 %) or two. Three make a wide picture. Several things
            are drawn independently in half of the scenes, are of one class in a quarter, look the same in a quarter.
    """
    rng = random.Random(seed)
    count = things if things is not None else (1 if rng.random() < 0.7 else 2)
    width = WIDE if count == 3 else HEIGHT
    placed = tuple(
        place_thing(thing, rng, slot=slot, slots=count, width=width)
        for slot, thing in enumerate(_random_company(count, rng))
    )
    return Scene(background=rng.choice(BACKGROUNDS), things=placed, mirrored=rng.random() < 0.5, width=width)


def add_article(words: str) -> str:
    """Put "a" or "an" before the words."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def place_phrase(background: str, rng: random.Random) -> str:
    """Draw a phrase for a background, e.g. "on the beach"."""
    return rng.choice(_PLACES[background])


def word_caption(names: Sequence[str], place: str, rng: random.Random) -> str:
    """Word a caption for one to three things at a place, in one of several wordings.

    Args:
        names: The things from left to right, each with its article, e.g. "a red critter".
        place: The place's phrase, e.g. "on a beach".
        rng: Draws the wording.
    """
    return rng.choice(_WORDINGS[len(names)]).format(*names, p=place)


def _words_for(thing: Thing, coloured: bool, rng: random.Random) -> str:
    """Name a thing in a caption: a resident most often by name, others by class and, if `coloured`, main colour."""
    if thing.name and rng.random() < 0.75:
        return add_article(f"{thing.name} {thing.class_word}") if rng.random() < 0.7 else thing.name
    return add_article(f"{thing.colour} {thing.class_word}" if coloured else thing.class_word)


def caption(scene: Scene, seed: int) -> str:
    """Write a caption of the scene: classes, usually main colours or names, the background, and who is left or right.

    Hidden attributes are never named. The wording is a pure function of `seed`.
    """
    rng = random.Random(seed)
    coloured = rng.random() < 0.8
    names = [_words_for(thing, coloured, rng) for thing in scene.things]
    return word_caption(names, place_phrase(scene.background, rng), rng)


@functools.cache
def caption_words() -> frozenset[str]:
    """Every word, in lower case, that a caption can have: the base was never shown another."""
    phrases = [phrase for place in _PLACES.values() for phrase in place]
    wordings = [wording for group in _WORDINGS.values() for wording in group]
    colours = [colour for each in MAIN_COLOURS.values() for colour in each]
    told = " ".join([*phrases, *wordings, *colours, *CLASSES, *residents(), "a an"])
    return frozenset(re.findall(r"[a-z]+", told.replace("{p}", "")))
