"""Stage five of the demo: measure the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from diffusers_mixofshow.demo.intervals import Intervals, spread_of_identity, spread_of_regions, spread_of_retention
from diffusers_mixofshow.demo.photos import read_photo_images
from diffusers_mixofshow.demo.sampling import Pictures
from diffusers_mixofshow.demo.settings import DemoConcept
from diffusers_mixofshow.evaluation.identity import (
    Identity,
    Judge,
    Subject,
    find_concepts_in_regions,
    mean_identity,
    measure_identity,
    measure_in_regions,
    region_accuracy,
    retention,
)
from diffusers_mixofshow.evaluation.prompts import column_boxes


@dataclass(frozen=True, kw_only=True)
class Measures:
    """All measures of the demo.

    Args:
        identity: Method to concept name to identity; the method ``photos`` compares the photos with themselves, as a
            ceiling for the others.
        mean: Method to the mean identity over concepts.
        retention: ``average`` and ``fused`` to the share of identity kept, for every measure.
        found: Method (``regional``, ``unguided``) to the concept found in every region of every picture.
        regions: Method to the shares of ``regions`` and ``whole_pictures`` with the right concepts, and of ``looks``
            (attributes) read right in regions, None if these are not known.
        intervals: How sure `mean`, `retention` and `regions` are.
    """

    identity: dict[str, dict[str, Identity]]
    mean: dict[str, Identity]
    retention: dict[str, dict[str, float | None]]
    found: dict[str, list[list[str]]]
    regions: dict[str, dict[str, float | None]]
    intervals: Intervals

    def as_record(self) -> dict[str, Any]:
        """All numbers as JSON values."""
        return {
            "identity": {
                method: {name: identity.as_record() for name, identity in concepts.items()}
                for method, concepts in self.identity.items()
            },
            "mean_identity": {method: identity.as_record() for method, identity in self.mean.items()},
            "identity_retention": self.retention,
            "right_concept_in_region": self.regions,
            "concepts_found_in_regions": self.found,
            "intervals": {
                "mean_identity": self.intervals.mean,
                "identity_retention": self.intervals.retention,
                "right_concept_in_region": self.intervals.regions,
            },
        }


def measure_all(concepts: Sequence[DemoConcept], pictures: Pictures, judge: Judge) -> Measures:
    """Measure the identity of every concept alone, and which concept each region shows."""
    photos = {concept.name: read_photo_images(concept) for concept in concepts}
    subjects = [_make_subject(concept, photos[concept.name], judge) for concept in concepts]
    alone: Mapping[str, Mapping[str, Sequence[Image.Image]]] = {"photos": photos, **pictures.alone}
    each = {method: _measure_each(of_method, subjects, judge) for method, of_method in alone.items()}
    identity = {
        method: {name: mean_identity(of_concept) for name, of_concept in of_method.items()}
        for method, of_method in each.items()
    }
    mean = {method: mean_identity(list(of_method.values())) for method, of_method in identity.items()}
    meeting = [subject for subject in subjects if subject.name in pictures.order[0]]
    boxes = column_boxes(len(meeting))
    together = {"regional": pictures.regional, "unguided": pictures.unguided}
    found = {method: find_concepts_in_regions(images, boxes, meeting, judge) for method, images in together.items()}
    looks = {method: _measure_looks(images, pictures, meeting, judge) for method, images in together.items()}
    return Measures(
        identity=identity,
        mean=mean,
        retention={
            method: retention(mean[method], mean["single"], mean["class word"]) for method in ("average", "fused")
        },
        found=found,
        regions={
            method: {**region_accuracy(found[method], pictures.order), "looks": _mean_looks(looks[method])}
            for method in together
        },
        intervals=Intervals(
            mean={method: spread_of_identity(of_method) for method, of_method in each.items()},
            retention=spread_of_retention(each, mean["single"], mean["class word"]),
            regions={method: spread_of_regions(found[method], pictures.order, looks[method]) for method in together},
        ),
    )


def _measure_each(
    pictures: Mapping[str, Sequence[Image.Image]], subjects: Sequence[Subject], judge: Judge
) -> dict[str, list[Identity]]:
    """Concept name to the identity of each of its pictures."""
    return {
        subject.name: [measure_identity([picture], subject, subjects, judge) for picture in pictures[subject.name]]
        for subject in subjects
    }


def _measure_looks(
    images: Sequence[Image.Image], pictures: Pictures, meeting: Sequence[Subject], judge: Judge
) -> list[float] | None:
    """Share of the right concept's attributes read in regions, of each picture; None if attributes are not known."""
    if not all(subject.attributes for subject in meeting):
        return None
    by_name, boxes = {subject.name: subject for subject in meeting}, column_boxes(len(meeting))
    return [
        measure_in_regions(image, boxes, [by_name[name] for name in names], judge).looks
        for image, names in zip(images, pictures.order, strict=True)
    ]


def _mean_looks(looks: Sequence[float] | None) -> float | None:
    return None if looks is None else round(sum(looks) / len(looks), 4)


def _make_subject(concept: DemoConcept, photos: Sequence[Image.Image], judge: Judge) -> Subject:
    return Subject(
        name=concept.name,
        photos=judge.features(photos),
        attributes=concept.attributes,
        class_word=concept.class_word if concept.attributes else None,
    )
