"""Toyland's own judges on what they should know best: drawings of its concepts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.judging import is_colour, share_of_looks, subject_of
from diffusers_mixofshow import toyland
from diffusers_mixofshow.evaluation.metrics import attribute_accuracy, cosine_matrix
from diffusers_mixofshow.evaluation.prompts import TOGETHER_PLACES
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge, hidden_attributes
from diffusers_mixofshow.toyland.world import CLASSES


@pytest.fixture(scope="module")
def judge() -> ToylandJudge:
    return ToylandJudge.load()


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("bobo", {"colour": "blue", "ear_colour": "red", "ear_shape": "round", "eyes": "two", "eye_colour": "yellow",
                  "pattern": "spots", "pattern_colour": "yellow", "belly_colour": "white", "hat": "bare",
                  "wings": "none"}),
        ("ming", {"colour": "blue", "shape": "round", "pattern": "stripes", "pattern_colour": "white",
                  "flower_colour": "pink"}),
    ],
)  # fmt: skip
def test_what_is_hidden_is_all_that_no_caption_names(name: str, attributes: dict[str, str]) -> None:
    assert hidden_attributes(toyland.CONCEPTS[name]) == attributes


@pytest.mark.parametrize("name", ["bobo", "kiki", "rex", "ming"])
def test_drawings_of_a_concept_are_read_as_what_they_show(judge: ToylandJudge, name: str) -> None:
    concept = toyland.CONCEPTS[name]
    images = [photo.image for photo in toyland.photos(concept)]
    read = judge.read(images)
    assert len(read) == len(images)
    assert [seen["class"] for seen in read] == [concept.class_word] * len(images)
    assert attribute_accuracy(read, hidden_attributes(concept)) > 0.9
    subject = subject_of(concept, judge)
    assert (subject.name, subject.class_word) == (name, concept.class_word)
    assert subject.attributes == hidden_attributes(concept)
    assert torch.equal(subject.photos, judge.features(images))


def test_texts_and_pictures_are_compared_in_one_space(judge: ToylandJudge) -> None:
    """The description of its class and background is nearer to a drawing than that of another."""
    photos = {name: toyland.photos(toyland.CONCEPTS[name])[0].image for name in ("rex", "ming")}
    texts = judge.text_features(["a dog in a meadow", "a vase in a meadow"])
    likeness = cosine_matrix(judge.features(list(photos.values())), texts)
    assert likeness[0, 0] > likeness[0, 1]
    assert likeness[1, 1] > likeness[1, 0]


def test_the_class_is_the_one_whose_texts_are_nearest_and_not_the_attribute_readers(judge: ToylandJudge) -> None:
    """On pictures of nothing, which the attribute reader, trained on drawings, takes for other classes."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    nearest = []
    for features in judge.features(images):
        means = {
            name: torch.stack(
                [
                    torch.nn.functional.cosine_similarity(
                        features, judge.text_features([f"a {name} {place}"])[0], dim=0
                    )
                    for place in TOGETHER_PLACES
                ]
            ).mean()
            for name in CLASSES
        }
        nearest.append(max(means, key=means.__getitem__))
    assert [seen["class"] for seen in judge.read(images)] == nearest
    reader = toyland.load_reader()
    others = reader.read(images)["class"].argmax(dim=1)
    assert [reader.vocabulary["class"][int(index)] for index in others] != nearest


def test_colours_and_shapes_are_read_apart(judge: ToylandJudge) -> None:
    """Of a critter with one wrong colour and one wrong shape."""
    subject = subject_of(toyland.CONCEPTS["bobo"], judge)
    colours = [name for name in subject.attributes if is_colour(name)]
    assert sorted(colours) == sorted(["colour", "ear_colour", "eye_colour", "pattern_colour", "belly_colour"])
    seen = {**subject.attributes, "ear_colour": "green", "ear_shape": "long"}
    assert share_of_looks([seen], subject, is_colour) == 0.8
    assert share_of_looks([seen, dict(subject.attributes)], subject, lambda name: not is_colour(name)) == 0.9
