"""The drawn world: a pure function of a scene, whose captions never give identity away."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from diffusers_mixofshow.toyland.concepts import CONCEPTS
from diffusers_mixofshow.toyland.scenes import caption, random_scene, residents
from diffusers_mixofshow.toyland.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    HEIGHT,
    MAIN_COLOURS,
    WIDE,
    Scene,
    Thing,
    draw,
)


@pytest.mark.parametrize("seed", range(8))
def test_the_same_seed_draws_the_same_picture(seed: int) -> None:
    first, second = draw(random_scene(seed)), draw(random_scene(seed))
    assert first.image.tobytes() == second.image.tobytes()
    assert first.boxes == second.boxes


def test_other_seeds_draw_other_pictures() -> None:
    assert len({draw(random_scene(seed)).image.tobytes() for seed in range(40)}) == 40


@pytest.mark.parametrize("things", [1, 2, 3])
def test_every_thing_has_a_mask_and_the_box_around_it(things: int) -> None:
    for seed in range(12):
        drawing = draw(random_scene(seed, things=things))
        assert drawing.image.size == ((WIDE if things == 3 else HEIGHT), HEIGHT)
        assert len(drawing.masks) == len(drawing.boxes) == things
        for mask, (left, top, right, bottom) in zip(drawing.masks, drawing.boxes, strict=True):
            assert mask.mode == "L"
            rows, columns = np.nonzero(np.asarray(mask))
            assert (left, right) == (columns.min() / mask.width, (columns.max() + 1) / mask.width)
            assert (top, bottom) == (rows.min() / mask.height, (rows.max() + 1) / mask.height)


def test_a_mask_covers_what_the_thing_changes() -> None:
    scene = random_scene(3, things=1)
    bare = np.asarray(draw(Scene(background=scene.background, things=(), mirrored=scene.mirrored)).image, dtype=int)
    drawing = draw(scene)
    changed = np.abs(np.asarray(drawing.image, dtype=int) - bare).sum(axis=2) > 12
    assert (np.asarray(drawing.masks[0])[changed] > 0).mean() > 0.97


def test_things_of_a_pair_stand_on_their_own_sides() -> None:
    for seed in range(30):
        left, right = draw(random_scene(seed, things=2)).boxes
        assert left[2] <= 0.53
        assert right[0] >= 0.47


def test_captions_name_no_hidden_attribute() -> None:
    allowed = {colour for colours in MAIN_COLOURS.values() for colour in colours}
    hidden = {value for values in ATTRIBUTES.values() for choices in values.values() for value in choices} - allowed
    hidden -= {"one", "two"}  # numerals may count things, never eyes
    parts = {"ear", "ears", "eye", "eyes", "belly", "pattern", "hat", "collar", "flower", "cushion", "cloth", "leg"}
    for seed in range(600):
        scene = random_scene(seed, things=1 + seed % 3)
        words = set(re.findall("[a-z]+", caption(scene, seed)))
        assert not words & (hidden | parts)
        assert {word for word in words if word in COLOURS} <= {thing.colour for thing in scene.things}
        called = {thing.class_word for thing in scene.things if thing.name not in words or not thing.name}
        assert {word for word in words if word in CLASSES} >= called


def test_residents_are_the_same_in_every_process_and_no_test_concept_is_one() -> None:
    script = "from diffusers_mixofshow.toyland import residents; print(repr(sorted(residents().items())))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == repr(sorted(residents().items()))
    looks = [(thing.class_word, thing.colour, dict(thing.attributes)) for thing in residents().values()]
    for concept in CONCEPTS.values():
        assert (concept.class_word, concept.colour, dict(concept.attributes)) not in looks
        assert concept.name not in residents()


def test_half_of_the_things_are_residents_and_most_captions_use_their_names() -> None:
    scenes = [random_scene(seed, things=1) for seed in range(800)]
    known = [scene for scene in scenes if scene.things[0].name]
    assert 0.44 < len(known) / len(scenes) < 0.56
    named = [scene.things[0].name in caption(scene, seed) for seed, scene in enumerate(known)]
    assert 0.65 < sum(named) / len(named) < 0.85


@pytest.mark.parametrize("count", [2, 3])
def test_several_things_are_often_of_one_class_and_sometimes_look_the_same(count: int) -> None:
    def look(thing: Thing) -> tuple[object, ...]:
        return thing.class_word, thing.colour, dict(thing.attributes), thing.name

    scenes = [random_scene(seed, things=count) for seed in range(600)]
    one_class = sum(len({thing.class_word for thing in scene.things}) == 1 for scene in scenes) / len(scenes)
    twins = sum(all(look(thing) == look(scene.things[0]) for thing in scene.things) for scene in scenes) / len(scenes)
    assert 0.45 < one_class < 0.68
    assert 0.19 < twins < 0.31


def test_a_caption_depends_on_nothing_hidden() -> None:
    plain = Scene(background="beach", things=(Thing(class_word="critter", colour="red"),))
    fancy = Scene(
        background="beach", things=(Thing(class_word="critter", colour="red", attributes={"belly_colour": "blue"}),)
    )
    assert [caption(plain, seed) for seed in range(20)] == [caption(fancy, seed) for seed in range(20)]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_backgrounds_look_different(background: str) -> None:
    pictures = {name: draw(Scene(background=name, things=())).image.tobytes() for name in BACKGROUNDS}
    assert sum(picture == pictures[background] for picture in pictures.values()) == 1
