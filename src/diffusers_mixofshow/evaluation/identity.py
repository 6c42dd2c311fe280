"""Identity of concepts in sampled pictures: alone under several methods, and each in its region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from PIL import Image

from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.evaluation import metrics


Box = tuple[float, float, float, float]

CROP_SHARE = 1.3
"""Side of the square cut around a region, as a multiple of the region's width."""

NOBODY = ""
"""In place of a concept's name: what stands there is of no candidate's class."""


class Judge(Protocol):
    """A model that judges pictures: features of pictures and texts, and attributes that it reads."""

    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features of the metric model, shape (n, d)."""

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Features of texts in the same space, shape (n, d)."""

    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """For every picture, attribute name to the value read; ``class`` is one where classes are read."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A concept as the judge knows it.

    Args:
        name: The concept's name.
        photos: Features of its photos, shape (m, d).
        attributes: What the attribute reader should find; empty where it is not known.
        class_word: What the judge calls its class; None where it reads no classes.
    """

    name: str
    photos: torch.Tensor
    attributes: Mapping[str, str]
    class_word: str | None = None


@dataclass(frozen=True, kw_only=True)
class Identity:
    """How well pictures show a concept; every number from 0 to 1.

    Args:
        alignment: Mean pairwise cosine with the photos.
        attributes: Share of the attributes read right; None where they are not known.
        nearest: Share of pictures whose nearest photos, among all concepts', are its own.
    """

    alignment: float
    attributes: float | None
    nearest: float

    def as_record(self) -> dict[str, float | None]:
        """Rounded JSON values."""
        return {name: None if value is None else round(value, 4) for name, value in asdict(self).items()}


def measure_identity(
    pictures: Sequence[Image.Image], subject: Subject, others: Sequence[Subject], judge: Judge
) -> Identity:
    """Measure pictures that should show one concept.

    Args:
        pictures: Sampled pictures.
        subject: The concept.
        others: All candidates for the nearest concept, the subject among them.
        judge: Who looks.
    """
    features = judge.features(pictures)
    references = {other.name: other.photos for other in others}
    read = judge.read(pictures) if subject.attributes else []
    return Identity(
        alignment=metrics.image_alignment(features, subject.photos),
        attributes=metrics.attribute_accuracy(read, subject.attributes) if subject.attributes else None,
        nearest=metrics.retrieval_accuracy(features, [subject.name] * len(pictures), references),
    )


def mean_identity(identities: Sequence[Identity]) -> Identity:
    """Mean over concepts; attributes over those concepts where they are known."""
    known = [identity.attributes for identity in identities if identity.attributes is not None]
    return Identity(
        alignment=sum(identity.alignment for identity in identities) / len(identities),
        attributes=sum(known) / len(known) if known else None,
        nearest=sum(identity.nearest for identity in identities) / len(identities),
    )


def retention(fused: Identity, single: Identity, class_word: Identity) -> dict[str, float | None]:
    """Share of the identity that tuning gained and fusion keeps, for every measure; None where nothing was gained."""
    kept: dict[str, float | None] = {}
    for measure in ("alignment", "attributes"):
        values = [getattr(identity, measure) for identity in (fused, single, class_word)]
        try:
            kept[measure] = None if None in values else round(metrics.identity_retention(*values), 4)
        except ConfigurationError:
            kept[measure] = None
    return kept


def crop_region(image: Image.Image, box: Box) -> Image.Image:
    """Cut a square around a region's lower middle, where things stand, as large as the picture is high.

    Args:
        image: The whole picture.
        box: Left, top, right, bottom as fractions.
    """
    left, _, right, bottom = (
        fraction * side for fraction, side in zip(box, (image.width, image.height) * 2, strict=True)
    )
    side = min(CROP_SHARE * (right - left), image.height, image.width)
    start = min(max((left + right - side) / 2, 0), image.width - side)
    top = min(max(bottom - side, 0), image.height - side)
    square = (start, top, start + side, top + side)
    return image.resize((image.height, image.height), Image.Resampling.BICUBIC, box=square)


def concepts_in_regions(
    pictures: Sequence[Image.Image], boxes: Sequence[Box], candidates: Sequence[Subject], judge: Judge
) -> list[list[str]]:
    """Name the concept that every region shows.

    Where the attributes of all candidates are known, it is the one with the largest share of its attributes read in
    the region; the metric model's nearest photos decide between equal shares, and where attributes are not known. A
    candidate whose class is known is found only where its class is read, so that a brown cat is nobody where a brown
    dog was asked for.

    Args:
        pictures: Pictures with several concepts.
        boxes: The regions.
        candidates: The concepts that a region may show.
        judge: Who looks.

    Returns:
        For every picture, one name a region; `NOBODY` where there is none.
    """
    crops = [crop_region(picture, box) for picture in pictures for box in boxes]
    similarity = _similarity(judge.features(crops), candidates)
    if all(candidate.attributes for candidate in candidates):
        agreement = _agreement(judge.read(crops), candidates)
        in_question = (agreement == agreement.amax(dim=1, keepdim=True)) & agreement.isfinite()
        similarity = similarity.where(in_question, -torch.inf)
    likeliest = similarity.max(dim=1)
    names = [
        NOBODY if score == -torch.inf else candidates[int(index)].name
        for score, index in zip(likeliest.values, likeliest.indices, strict=True)
    ]
    return [names[start : start + len(boxes)] for start in range(0, len(names), len(boxes))]


def region_accuracy(found: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of regions, and of whole pictures, with the right concepts.

    Args:
        found: For every picture, one name a region.
        expected: The right names.
    """
    hits = [[name == right for name, right in zip(*rows, strict=True)] for rows in zip(found, expected, strict=True)]
    regions = [hit for row in hits for hit in row]
    return {
        "regions": round(sum(regions) / len(regions), 4),
        "whole_pictures": round(sum(all(row) for row in hits) / len(hits), 4),
    }


@dataclass(frozen=True, kw_only=True)
class InRegions:
    """How well one picture shows several concepts, each in its region; every number from 0 to 1.

    Args:
        found: Name of what each region shows, see `concepts_in_regions`.
        right: Share of regions that show the right one.
        looks: Share of its own concept's attributes that each region shows, on average.
        likeness: Mean cosine of each region with its own concept's photos, on average.
    """

    found: tuple[str, ...]
    right: float
    looks: float
    likeness: float


def measure_in_regions(
    picture: Image.Image, boxes: Sequence[Box], expected: Sequence[Subject], judge: Judge
) -> InRegions:
    """Measure one picture of several concepts.

    Args:
        picture: The picture.
        boxes: The regions.
        expected: What each region should show; the candidates for what is found are these.
        judge: Who looks.
    """
    (found,) = concepts_in_regions([picture], boxes, expected, judge)
    crops = [crop_region(picture, box) for box in boxes]
    features, read = judge.features(crops), judge.read(crops)
    count = len(expected)
    return InRegions(
        found=tuple(found),
        right=sum(name == subject.name for name, subject in zip(found, expected, strict=True)) / count,
        looks=sum(
            metrics.attribute_accuracy([seen], subject.attributes)
            for seen, subject in zip(read, expected, strict=True)
        )
        / count,
        likeness=sum(
            metrics.image_alignment(features[number : number + 1], subject.photos)
            for number, subject in enumerate(expected)
        )
        / count,
    )


def _similarity(features: torch.Tensor, candidates: Sequence[Subject]) -> torch.Tensor:
    """Mean cosine with every candidate's photos, shape (n, candidates)."""
    return torch.stack([metrics.cosine_matrix(features, each.photos).mean(dim=1) for each in candidates], dim=1)


def _agreement(read: Sequence[Mapping[str, str]], candidates: Sequence[Subject]) -> torch.Tensor:
    """Share of every candidate's attributes read in every crop, shape (n, candidates); -inf for other classes."""
    shares = [
        [
            metrics.attribute_accuracy([crop], candidate.attributes)
            if candidate.class_word in (None, crop.get("class"))
            else -torch.inf
            for candidate in candidates
        ]
        for crop in read
    ]
    return torch.tensor(shares, dtype=torch.float64)
