"""Identity alone and in regions, with a judge that sees nothing but mean colours."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from benchmarks.judging import confusion, regions_of, summarise_regions
from diffusers_mixofshow.concepts import KINDS
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.evaluation.identity import (
    NOBODY,
    Identity,
    Subject,
    crop_region,
    find_concepts_in_regions,
    mean_identity,
    measure_identity,
    measure_in_regions,
    region_accuracy,
    retention,
)
from diffusers_mixofshow.evaluation.prompts import (
    HELD_OUT_PROMPTS,
    HELD_OUT_SCENE_PROMPTS,
    RECORDING_PROMPTS,
    column_boxes,
    evaluation_prompts,
    name_with_class,
    prompt_together,
)
from diffusers_mixofshow.evaluation.sampling import fill_templates


class ColourJudge:
    """Features are the middle pixel; it reads one attribute, whether that is red."""

    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.tensor([image.getpixel((image.width // 2, image.height // 2)) for image in images]).float() + 1

    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        return [{"red": "yes" if row[0] > row[2] else "no"} for row in self.features(images)]


JUDGE = ColourJudge()
RED, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
SUBJECTS = [
    Subject(name="ruby", photos=JUDGE.features([RED]), attributes={"red": "yes"}),
    Subject(name="azure", photos=JUDGE.features([BLUE]), attributes={"red": "no"}),
]


def test_identity_of_the_photos_themselves_is_full() -> None:
    assert measure_identity([RED, RED], SUBJECTS[0], SUBJECTS, JUDGE) == Identity(
        alignment=pytest.approx(1.0), attributes=1.0, nearest=1.0
    )


def test_identity_of_half_the_right_pictures_is_half() -> None:
    identity = measure_identity([RED, BLUE], SUBJECTS[0], SUBJECTS, JUDGE)
    assert (identity.attributes, identity.nearest) == (0.5, 0.5)


def test_means_leave_out_unknown_attributes() -> None:
    known = Identity(alignment=0.5, attributes=0.5, nearest=1.0)
    unknown = Identity(alignment=1.0, attributes=None, nearest=0.0)
    assert mean_identity([known, unknown]) == Identity(alignment=0.75, attributes=0.5, nearest=0.5)


def test_retention_is_none_where_tuning_gained_nothing() -> None:
    floor = Identity(alignment=0.5, attributes=0.5, nearest=0.0)
    single = Identity(alignment=0.9, attributes=0.5, nearest=1.0)
    fused = Identity(alignment=0.7, attributes=0.9, nearest=1.0)
    assert retention(fused, single, floor) == {"alignment": 0.5, "attributes": None}


def test_concepts_are_found_where_they_stand() -> None:
    picture = Image.new("RGB", (96, 64), "blue")
    picture.paste("red", (0, 0, 48, 64))
    found = find_concepts_in_regions([picture], column_boxes(2), SUBJECTS, JUDGE)
    assert found == [["ruby", "azure"]]
    assert region_accuracy(found, [("ruby", "ruby")]) == {"regions": 0.5, "whole_pictures": 0.0}


def test_a_picture_is_measured_region_by_region() -> None:
    picture = Image.new("RGB", (96, 64), "blue")
    picture.paste("red", (0, 0, 48, 64))
    ruby, azure = SUBJECTS
    both = measure_in_regions(picture, column_boxes(2), [ruby, azure], JUDGE)
    assert both.found == ("ruby", "azure")
    assert (both.right, both.looks) == (1, 1)
    own = [
        float(torch.cosine_similarity(JUDGE.features([each]), subject.photos))
        for each, subject in ((RED, ruby), (BLUE, azure))
    ]
    assert both.likeness == pytest.approx(sum(own) / 2)
    exchanged = measure_in_regions(picture, column_boxes(2), [azure, ruby], JUDGE)
    assert exchanged.found == ("ruby", "azure")
    assert (exchanged.right, exchanged.looks) == (0, 0)
    crossed = float(torch.cosine_similarity(JUDGE.features([RED]), azure.photos))
    assert exchanged.likeness == pytest.approx(crossed)

    summary = summarise_regions([both, exchanged, both, both])
    assert summary["right"]["mean"] == summary["whole_pictures"]["mean"] == summary["looks"]["mean"] == 0.75
    assert confusion([both, exchanged], [("ruby", "azure"), ("azure", "ruby")]) == {
        "ruby": {"ruby": 1, "azure": 1},
        "azure": {"azure": 1, "ruby": 1},
    }
    half = measure_in_regions(Image.new("RGB", (96, 64), "blue"), column_boxes(2), [ruby, azure], JUDGE)
    assert summarise_regions([half])["right"]["mean"] == 0.5
    assert summarise_regions([half])["whole_pictures"]["mean"] == 0


class Stranger(ColourJudge):
    """Reads what it was told, whatever the picture shows."""

    def __init__(self, **told: str) -> None:
        self.told = told

    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        return [self.told for _ in images]


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"hat": "red", "eyes": "big", "stripes": "yes"}, "azure"),  # three of three against two, whatever the colour
        ({"hat": "red", "eyes": "small", "stripes": "no"}, "ruby"),
        ({"hat": "red", "eyes": "none", "stripes": "yes"}, "azure"),  # two of three against one
        ({"hat": "red", "eyes": "none", "stripes": "none"}, "ruby"),  # one each: the picture is red
        ({"hat": "none", "eyes": "none", "stripes": "none"}, "ruby"),  # none of them
    ],
)
def test_attributes_decide_and_the_likeness_breaks_ties(told: dict[str, str], found: str) -> None:
    candidates = [
        dataclasses.replace(SUBJECTS[0], attributes={"hat": "red", "eyes": "small", "stripes": "no"}),
        dataclasses.replace(SUBJECTS[1], attributes={"hat": "red", "eyes": "big", "stripes": "yes"}),
    ]
    likeness = [float(torch.cosine_similarity(JUDGE.features([RED]), each.photos)) for each in candidates]
    assert likeness[0] > likeness[1] + 2 / 3  # more than any difference between the shares of attributes here
    assert find_concepts_in_regions([RED], column_boxes(1), candidates, Stranger(**told)) == [[found]]


class ClassJudge(ColourJudge):
    """Reads classes as well: what is light is a dog."""

    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        classes = ["dog" if row.sum() > 500 else "cat" for row in self.features(images)]
        return [seen | {"class": name} for seen, name in zip(super().read(images), classes, strict=True)]


def test_a_concept_is_found_only_where_its_class_is_read() -> None:
    picture = Image.new("RGB", (96, 64), (255, 200, 200))
    picture.paste("red", (0, 0, 48, 64))
    candidates = [dataclasses.replace(subject, class_word="dog") for subject in SUBJECTS]
    assert find_concepts_in_regions([picture], column_boxes(2), candidates, ClassJudge()) == [[NOBODY, "ruby"]]


def test_a_region_is_cut_as_a_square_that_stays_inside() -> None:
    picture = Image.new("RGB", (96, 64), "blue")
    picture.paste("red", (64, 22, 96, 64))
    crop = crop_region(picture, (2 / 3, 0.0, 1.0, 1.0))
    assert crop.size == (64, 64)
    assert crop.getpixel((60, 60)) == (255, 0, 0)


def test_measured_prompts_are_held_out() -> None:
    assert not set(HELD_OUT_PROMPTS) & set(RECORDING_PROMPTS)


def test_prompts_name_every_concept() -> None:
    bobo, rex = name_with_class("bobo", "critter"), name_with_class("rex", "dog")
    together = prompt_together((bobo, bobo, rex), "at night")
    assert together == "a <bobo> critter, a <bobo> critter and a <rex> dog at night"
    regions = regions_of((bobo, rex), column_boxes(2), "in snow")
    assert [region.prompt for region in regions] == [
        "a <bobo> critter and a <bobo> critter in snow",
        "a <rex> dog and a <rex> dog in snow",
    ]
    assert [region.prompt for region in regions_of((rex,), column_boxes(1), "in snow")] == ["a <rex> dog in snow"]
    assert fill_templates(("a <TOK>", "<TOK> here"), "dog", 3) == ["a dog", "dog here", "a dog"]
    with pytest.raises(ConfigurationError, match="<TOK>"):
        fill_templates(("a dog",), "dog", 1)
    with pytest.raises(ConfigurationError, match="none given"):
        fill_templates((), "dog", 1)


@pytest.mark.parametrize(
    ("size", "box", "square"),
    [
        ((96, 64), (1 / 3, 0.25, 2 / 3, 0.97), (27.2, 20.48, 41.6)),  # 1.3 times as wide as the region, its foot
        ((96, 64), (0.0, 0.25, 1 / 3, 0.97), (0, 20.48, 41.6)),  # moved in from the left edge
        ((96, 64), (2 / 3, 0.25, 1.0, 0.97), (54.4, 20.48, 41.6)),  # and from the right one
        ((96, 64), (1 / 3, 0.0, 2 / 3, 0.3), (27.2, 0, 41.6)),  # and from the top
        ((96, 64), (0.0, 0.0, 1.0, 1.0), (16, 0, 64)),  # no larger than the picture is high
        ((40, 64), (0.0, 0.0, 1.0, 1.0), (0, 24, 40)),  # nor than it is wide
    ],
)
def test_the_square_of_a_region_is_where_things_stand(size, box, square) -> None:
    """In pictures whose red tells the column and whose green the row, four times over."""
    picture = Image.new("RGB", size)
    picture.putdata([(2 * x, 2 * y, 0) for y in range(size[1]) for x in range(size[0])])
    left, top, side = square
    crop = crop_region(picture, box)
    assert crop.size == (size[1], size[1])
    step = side / size[1]
    for x, y in ((8, 8), (size[1] - 9, 8), (8, size[1] - 9)):
        expected = (2 * (left + (x + 0.5) * step - 0.5), 2 * (top + (y + 0.5) * step - 0.5))
        assert crop.getpixel((x, y))[:2] == pytest.approx(expected, abs=1.5)


def test_columns_are_equal_and_as_high_as_things_stand() -> None:
    assert column_boxes(2) == [(0, 0.25, 0.5, 0.97), (0.5, 0.25, 1, 0.97)]
    assert column_boxes(4)[2] == (0.5, 0.25, 0.75, 0.97)


def test_records_are_rounded_to_four_digits() -> None:
    identity = Identity(alignment=2 / 3, attributes=None, nearest=1 / 3)
    assert identity.as_record() == {"alignment": 0.6667, "attributes": None, "nearest": 0.3333}
    kept = retention(identity, Identity(alignment=1.0, attributes=1.0, nearest=0), identity)
    assert kept == {"alignment": 0.0, "attributes": None}


def test_shares_of_regions_are_counted_over_all_and_whole_pictures_apart() -> None:
    expected = [("ruby", "azure", "ruby")] * 3
    found = [("ruby", "azure", "ruby"), ("ruby", "ruby", "ruby"), ("azure", "azure", NOBODY)]
    assert region_accuracy(found, expected) == {"regions": 0.6667, "whole_pictures": 0.3333}


def test_looks_are_read_only_where_they_are_known() -> None:
    """A judge that cannot read is not asked to."""

    class Blind(ColourJudge):
        def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
            raise AssertionError("nobody asked for looks")

    unknown = dataclasses.replace(SUBJECTS[0], attributes={})
    assert measure_identity([RED], unknown, [unknown, SUBJECTS[1]], Blind()) == Identity(
        alignment=pytest.approx(1.0), attributes=None, nearest=1.0
    )
    assert find_concepts_in_regions([RED], column_boxes(1), [unknown, SUBJECTS[1]], Blind()) == [["ruby"]]


def test_prompts_of_regions_and_of_the_whole_picture_in_words() -> None:
    assert prompt_together(["a <rex> dog"], "at night") == "a <rex> dog at night"
    assert prompt_together(["a", "b", "c"], "here") == "a, b and c here"
    assert name_with_class("rex", "dog") == "a <rex> dog"
    regions = regions_of(["a", "b"], [(0, 0, 0.5, 1), (0.5, 0, 1, 1)], "here")
    assert [(region.prompt, region.box) for region in regions] == [
        ("a and a here", (0, 0, 0.5, 1)), ("b and b here", (0.5, 0, 1, 1)),
    ]  # fmt: skip


@pytest.mark.parametrize("base", ["toyland", "Toyland", "someone/base"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_base_and_kind_has_prompts_of_its_own(base: str, kind: str) -> None:
    prompts = evaluation_prompts(base, kind)
    if base == "someone/base":
        assert len(prompts) == len(set(prompts)) == 6
        assert [kind for kind in KINDS if evaluation_prompts(base, kind) == prompts] == [kind]
    else:
        assert prompts == (HELD_OUT_SCENE_PROMPTS if kind == "scene" else HELD_OUT_PROMPTS)
