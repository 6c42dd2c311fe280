"""The judge of Toyland's pictures: Toyland's metric model and its attribute reader."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch
from PIL import Image

from diffusers_mixofshow import toyland
from diffusers_mixofshow.evaluation.metrics import cosine_matrix
from diffusers_mixofshow.evaluation.prompts import TOGETHER_PLACES
from diffusers_mixofshow.toyland.world import CLASSES


if TYPE_CHECKING:
    from diffusers_mixofshow.toyland.reader import AttributeReader


class ToylandJudge:
    """Judges pictures with Toyland's metric model and attribute reader; see `identity.Judge`.

    Args:
        metric_model: Computes features of pictures and texts.
        reader: Reads attributes of pictures.
    """

    def __init__(self, metric_model: toyland.MetricModel, reader: AttributeReader) -> None:
        self._metric_model = metric_model
        self._reader = reader

    @classmethod
    def load(cls) -> Self:
        """Load both models from the package."""
        return cls(toyland.load_metric_model(), toyland.load_reader())

    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features of the metric model, shape (n, d)."""
        return self._metric_model.image_features(images)

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Features of the metric model, shape (n, d)."""
        return self._metric_model.text_features(texts)

    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """For every picture, attribute name to its likeliest value.

        The class is the metric model's: the attribute reader, which was trained on drawings alone, takes a sampled dog
        without a collar for a table.
        """
        likeliest = {name: scores.argmax(dim=1) for name, scores in self._reader.read(images).items()}
        attributes = [
            {name: self._reader.vocabulary[name][int(values[index])] for name, values in likeliest.items()}
            for index in range(len(images))
        ]
        return [seen | {"class": name} for seen, name in zip(attributes, self._read_classes(images), strict=True)]

    @cached_property
    def _class_features(self) -> torch.Tensor:
        """Features of texts about every class at every place, shape (classes * places, d)."""
        return self.text_features([f"a {name} {place}" for name in CLASSES for place in TOGETHER_PLACES])

    def _read_classes(self, images: Sequence[Image.Image]) -> list[str]:
        """For every picture, the class whose texts, averaged over all places, are nearest."""
        likeness = cosine_matrix(self.features(images), self._class_features)
        likeness = likeness.view(len(images), len(CLASSES), len(TOGETHER_PLACES))
        return [CLASSES[int(index)] for index in likeness.mean(dim=2).argmax(dim=1)]


def hidden_attributes(concept: toyland.ToyConcept) -> dict[str, str]:
    """Attributes that distinguish a concept from others of its class: the main colour, and those no caption names."""
    from diffusers_mixofshow.toyland.concepts import as_thing
    from diffusers_mixofshow.toyland.reader import list_labels

    labels = list_labels(as_thing(concept), background="")
    return {name: value for name, value in labels.items() if name not in ("class", "background")}
