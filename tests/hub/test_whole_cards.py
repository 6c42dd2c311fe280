"""Whole cards, letter for letter, as they were read and found right: `cards/`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import packs
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora.card import example


CARDS = Path(__file__).parent / "cards"
SOURCES = [
    {"concepts": ["<rex>", "<tom>"], "weight": 2 / 3, "origin": "ann/x", "digest": "ab" * 32, "revision": "c0ffee1"},
    {"concepts": ["<joe>"], "weight": 12345.678, "origin": "/home/me/y", "digest": "cd" * 32, "revision": "main"},
    {"concepts": 3, "weight": None, "origin": "ann/x/y", "revision": "0123456789abcdef" * 2 + "01234567"},
]
MEASURED = {
    "metric_model": "a/clip",
    "pictures": 12,
    "concepts": {
        "<rex>": {
            "text_alignment": 0.781,
            "identity": {"alignment": 0.8123},
            "retention": {"alignment": 0.934, "attributes": 0.5},
        }
    },
}
FUSED = {
    "fusion": {
        "method": "closed-form",
        "sources": SOURCES,
        "residuals": {"mean": {"<rex>+<tom>": {"average": 0.5, "fused": 0.25}}},
    },
    "evaluation": MEASURED,
    "settings": {"rank": 4},
}
TUNED = {
    "settings": {"rank": 4, "pretrained_model_name_or_path": "/home/me/sd"},
    "photos": 5,
    "evaluation": {"pictures": 3},
}


def written(name: str) -> str:
    return (CARDS / name).read_text(encoding="utf-8")


def test_a_card_of_one_concept(pack) -> None:
    tuned = dataclasses.replace(pack, base_model="stable-diffusion-v1-5/stable-diffusion-v1-5", training=TUNED)
    assert str(tuned._card("me/rex", False, {"samples/0.png": "a <rex>"}, None)) == written("one.txt")


def test_a_card_of_a_merged_pipeline(components) -> None:
    three = packs.random_pack(components, "rex", "tom", "joe", ranks=(2, 4))
    assert str(dataclasses.replace(three, training=FUSED)._card("me/three", True, {}, "mit")) == written("three.txt")


@pytest.mark.parametrize("base", ["toyland", "someone/tiny"])
def test_the_code_of_every_kind_of_card(base: str) -> None:
    def concept(name: str, kind: str = "pet", word: str = "dog") -> Concept:
        return Concept.from_name(name, word, kind=kind)

    sea, sky, rex, tom = concept("sea", "scene"), concept("sky", "scene"), concept("rex"), concept("tom", "object")
    several = [rex, sea, tom, concept("ann", "character"), concept("joe")]
    codes = [
        example([rex], base, "here", merged=False),
        example([sea], base, "here", merged=True),
        example([rex, tom], base, "here", merged=False),
        example(several, base, "here", merged=True),
        example([sea, sky], base, "here", merged=False),
        example([concept("owl", word="owl"), rex, tom], base, "/secret/here", merged=False),
    ]
    assert "\n".join(codes) == written(f"{base.rpartition('/')[2]}.txt")


@pytest.mark.parametrize(
    ("base", "license_id"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m"),
        ("runwayml/stable-diffusion-v1-5", "creativeml-openrail-m"),
        ("CompVis/stable-diffusion-v1-4", "creativeml-openrail-m"),
        ("toyland", "apache-2.0"),
        ("someone/else", None),
    ],
)
def test_the_licence_of_a_base_that_is_known(pack, base: str, license_id: str | None) -> None:
    assert dataclasses.replace(pack, base_model=base)._card("x", False, {}, None).data.license == license_id


@pytest.mark.parametrize(("count", "kept"), [(9_000, True), (10_000, False)])
def test_a_record_that_nobody_would_read_is_left_out(pack, count: int, kept: bool) -> None:
    odd = dataclasses.replace(pack, training={"settings": {}, "note": "x" * count})
    assert ("How it was tuned" in str(odd._card("x", False, {}, None))) is kept
