"""Further instances of Toyland: as many as a study asks for, none alike, the same everywhere."""

import itertools

import pytest

from benchmarks.toyland_base.instances import random_instances
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.toyland.concepts import CONCEPTS, photos
from diffusers_mixofshow.toyland.scenes import residents


def test_instances_are_the_same_everywhere_and_fewer_are_the_first_of_more() -> None:
    many = random_instances(24, seed=1)
    assert random_instances(6, seed=1) == many[:6]
    assert random_instances(6, seed=2) != many[:6]


def test_no_instance_is_another_one_or_known_already() -> None:
    many = random_instances(24)
    names = [instance.name for instance in many]
    assert len({*names, *CONCEPTS, *residents()}) == len(names) + len(CONCEPTS) + len(residents())
    critters = [one for one in (*many, *CONCEPTS.values()) if one.class_word == "critter"]
    for one, other in itertools.combinations(critters, 2):
        if one.name in CONCEPTS and other.name in CONCEPTS:
            continue
        keys = {*one.attributes, *other.attributes}
        differing = sum(one.attributes.get(key) != other.attributes.get(key) for key in keys)
        assert differing + (one.colour != other.colour) >= 4


def test_instances_are_photographed_like_concepts() -> None:
    (instance,) = random_instances(1, class_word="vase")
    assert (instance.kind, instance.class_word) == ("object", "vase")
    photo = photos(instance, count=1)[0]
    assert photo.image.size == (64, 64)
    assert "<TOK>" in photo.caption


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="class 'dragon'"):
        random_instances(1, class_word="dragon")
    with pytest.raises(ConfigurationError, match="differ enough"):
        random_instances(1000, class_word="chair")
