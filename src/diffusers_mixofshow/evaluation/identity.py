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
"""Side of the square cut out around a region, as a multiple of the region's width."""

NOBODY = ""
"""In place of a concept's name for a region that shows no candidate's class."""


class Judge(Protocol):
    """A model that computes features of pictures and texts, and may read attributes of pictures."""

    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features of the metric model, shape (n, d)."""

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Features of texts in the same space, shape (n, d)."""

    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """For every picture, attribute name to the value read; ``class`` is among them if the model reads classes."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a judge compares pictures of a concept with.

    Args:
        name: The concept's name.
        photos: Features of its photos, shape (m, d).
        attributes: Values that the judge should read; empty if they are not known.
        class_word: The judge's word for its class; None if the judge reads no classes.
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
        attributes: Share of the attributes read right; None if they are not known.
        nearest: Share of pictures whose nearest photos, among all concepts', are the concept's own.
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
        others: All candidates for the nearest concept, including the subject.
        judge: Computes features and reads attributes.
    """
    features = judge.features(pictures)
    references = {other.name: other.photos for other in others}
    read = judge.read(pictures) if subject.attributes else []
    return Identity(
        alignment=metrics.image_alignment(features, subject.photos),
        attributes=metrics.attribute_accuracy(read, subject.attributes) if subject.attributes else None,
        nearest=metrics.retrieval_accuracy(features, [subject.name] * len(pictures), references),
    )


def measure_photos(photos: Sequence[Image.Image], subject: Subject, judge: Judge) -> dict[str, float | None]:
    """What photos of a concept score, each compared with the others, under the names of `retention`."""
    read = judge.read(photos) if subject.attributes else []
    return {
        "alignment": metrics.likeness_among(subject.photos),
        "attributes": metrics.attribute_accuracy(read, subject.attributes) if subject.attributes else None,
    }


def mean_identity(identities: Sequence[Identity]) -> Identity:
    """Mean over concepts; of attributes, over the concepts whose attributes are known."""
    known = [identity.attributes for identity in identities if identity.attributes is not None]
    return Identity(
        alignment=sum(identity.alignment for identity in identities) / len(identities),
        attributes=sum(known) / len(known) if known else None,
        nearest=sum(identity.nearest for identity in identities) / len(identities),
    )


def retention(fused: Identity, single: Identity, class_word: Identity) -> dict[str, float | None]:
    """Share of tuning's gain in identity that fusion keeps, for every measure; None if tuning gained nothing."""
    kept: dict[str, float | None] = {}
    for measure in ("alignment", "attributes"):
        values = [getattr(identity, measure) for identity in (fused, single, class_word)]
        try:
            kept[measure] = None if None in values else round(metrics.identity_retention(*values), 4)
        except ConfigurationError:
            kept[measure] = None
    return kept


def crop_region(image: Image.Image, box: Box) -> Image.Image:
    """Cut a square around a region's lower middle, where things stand, and enlarge it to the picture's height.

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


def find_concepts_in_regions(
    pictures: Sequence[Image.Image], boxes: Sequence[Box], candidates: Sequence[Subject], judge: Judge
) -> list[list[str]]:
    """Name the concept that every region shows.

    If the attributes of all candidates are known, it is the candidate with the largest share of its attributes read in
    the region; between equal shares, or if attributes are not known, the one with the nearest photos. A candidate
    whose class is known must also have its class read: a brown cat does not count as a brown dog.

    Args:
        pictures: Pictures with several concepts.
        boxes: The regions.
        candidates: The concepts that a region may show.
        judge: Computes features and reads attributes.

    Returns:
        For every picture, one name per region; `NOBODY` for a region that shows no candidate.
    """
    crops = [crop_region(picture, box) for picture in pictures for box in boxes]
    similarity = _measure_similarity(judge.features(crops), candidates)
    if all(candidate.attributes for candidate in candidates):
        agreement = _measure_agreement(judge.read(crops), candidates)
        in_question = (agreement == agreement.amax(dim=1, keepdim=True)) & agreement.isfinite()
        similarity = similarity.where(in_question, -torch.inf)
    likeliest = similarity.max(dim=1)
    names = [
        NOBODY if score == -torch.inf else candidates[int(index)].name
        for score, index in zip(likeliest.values, likeliest.indices, strict=True)
    ]
    return [names[start : start + len(boxes)] for start in range(0, len(names), len(boxes))]


def region_accuracy(found: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of regions with the right concept, and of pictures with the right concepts in all regions.

    Args:
        found: For every picture, one name per region.
        expected: The right names, likewise.
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
        found: Name of the concept that each region shows, see `find_concepts_in_regions`.
        right: Share of regions that show the right concept.
        looks: Share of the right concept's attributes read in a region, averaged over regions.
        likeness: Mean cosine of a region with the right concept's photos, averaged over regions.
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
        expected: The concept that each region should show; these are also the candidates for the concept found.
        judge: Computes features and reads attributes.
    """
    (found,) = find_concepts_in_regions([picture], boxes, expected, judge)
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


def _measure_similarity(features: torch.Tensor, candidates: Sequence[Subject]) -> torch.Tensor:
    """Mean cosine with every candidate's photos, shape (n, candidates)."""
    return torch.stack([metrics.cosine_matrix(features, each.photos).mean(dim=1) for each in candidates], dim=1)


def _measure_agreement(read: Sequence[Mapping[str, str]], candidates: Sequence[Subject]) -> torch.Tensor:
    """Share of each candidate's attributes read in each crop, shape (n, candidates); -inf if another class is read."""
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
