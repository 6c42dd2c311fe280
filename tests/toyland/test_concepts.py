"""Concepts: enough of them, photos as promised, captions that leave identity to be learnt."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_mixofshow.concepts import SLOT
from diffusers_mixofshow.errors import ConceptError, ConfigurationError
from diffusers_mixofshow.toyland.concepts import CONCEPTS, find_concept, photos, write_photos
from diffusers_mixofshow.toyland.world import ATTRIBUTES, COLOURS, MAIN_COLOURS


def test_there_are_as_many_concepts_as_promised() -> None:
    counts = Counter(concept.class_word for concept in CONCEPTS.values())
    assert counts["critter"] >= 8
    assert (counts["dog"], counts["vase"], counts["chair"]) == (2, 2, 1)
    assert sum(concept.kind == "scene" for concept in CONCEPTS.values()) == 1


def test_concepts_say_truly_whether_they_are_in_the_bases_domain() -> None:
    for concept in CONCEPTS.values():
        if concept.kind == "scene":
            continue
        known = ATTRIBUTES[concept.class_word]
        inside = concept.colour in MAIN_COLOURS[concept.class_word] and all(
            value in known.get(name, ()) for name, value in concept.attributes.items()
        )
        assert inside == concept.in_domain, concept.name
    assert {concept.in_domain for concept in CONCEPTS.values()} == {True, False}


def test_some_critters_share_their_main_colour() -> None:
    colours = Counter(concept.colour for concept in CONCEPTS.values() if concept.class_word == "critter")
    assert max(colours.values()) >= 2


@pytest.mark.parametrize("name", CONCEPTS)
def test_photos_are_reproducible_and_name_only_the_placeholder(name: str) -> None:
    first, again = photos(CONCEPTS[name], 12), photos(CONCEPTS[name], 12)
    assert len(first) == 12
    assert [photo.image.tobytes() for photo in first] == [photo.image.tobytes() for photo in again]
    assert len({photo.image.tobytes() for photo in first}) == 12
    for photo in first:
        assert photo.caption.count(SLOT) == 1
        assert photo.image.size == photo.mask.size == (64, 64)
        covered = np.asarray(photo.mask).mean() / 255
        assert 0.05 < covered < 0.95
        if CONCEPTS[name].kind != "scene":
            words = photo.caption.replace(",", " ").split()
            assert not set(words) & {*COLOURS, CONCEPTS[name].class_word, name}


def test_photos_come_in_all_backgrounds() -> None:
    captions = " ".join(photo.caption for photo in photos(CONCEPTS["bobo"], 12))
    for word in ("meadow", "beach", "desert", "snow", "night", "room"):
        assert word in captions


def test_written_photos_can_be_read_back(tmp_path: Path) -> None:
    concept = CONCEPTS["ming"]
    assert write_photos(concept, tmp_path / "ming", count=3) == tmp_path / "ming"
    names = sorted(str(file.relative_to(tmp_path / "ming")) for file in tmp_path.rglob("*.*"))
    expected = [f"{index:04d}{ending}" for index in range(3) for ending in (".png", ".txt")]
    assert names == sorted([*expected, *(f"masks/{index:04d}.png" for index in range(3))])
    for index, photo in enumerate(photos(concept, 3)):
        with Image.open(tmp_path / "ming" / f"{index:04d}.png") as image:
            assert image.tobytes() == photo.image.tobytes()
        assert (tmp_path / "ming" / f"{index:04d}.txt").read_text(encoding="utf-8").strip() == photo.caption


@pytest.mark.parametrize("name", ["ming", "neon"])
def test_higher_photos_show_the_same_in_more_pixels(tmp_path: Path, name: str) -> None:
    usual, high = photos(CONCEPTS[name], 2), photos(CONCEPTS[name], 2, height=192)
    for one, other in zip(usual, high, strict=True):
        assert other.image.size == other.mask.size == (192, 192)
        assert other.caption == one.caption
        for mine, theirs in ((one.image, other.image.reduce(3)), (one.mask, other.mask.reduce(3))):
            apart = np.abs(np.asarray(mine, dtype=float) - np.asarray(theirs, dtype=float))
            assert apart.mean() < 4
    write_photos(CONCEPTS[name], tmp_path, count=1, height=192)
    with Image.open(tmp_path / "0000.png") as written:
        assert written.tobytes() == high[0].image.tobytes()


def test_unknown_names_and_counts_are_explained() -> None:
    with pytest.raises(ConceptError, match="bobo"):
        find_concept("nobody")
    with pytest.raises(ConfigurationError, match="count is 0"):
        photos(CONCEPTS["bobo"], 0)
