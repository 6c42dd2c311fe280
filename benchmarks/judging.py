"""What several benchmarks need to judge pictures of several concepts, beside what the package has for everybody."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from diffusers_mixofshow import Region, toyland
from diffusers_mixofshow.evaluation import metrics
from diffusers_mixofshow.evaluation.identity import InRegions, Subject
from diffusers_mixofshow.evaluation.intervals import mean_with_interval
from diffusers_mixofshow.evaluation.prompts import prompt_together
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge, hidden_attributes


def subject_of(concept: toyland.ToyConcept, judge: ToylandJudge) -> Subject:
    """One of Toyland's things as the judge knows it from its usual photos."""
    return Subject(
        name=concept.name,
        photos=judge.features([photo.image for photo in toyland.photos(concept)]),
        attributes=hidden_attributes(concept),
        class_word=concept.class_word,
    )


def regions_of(
    subjects: Sequence[str], boxes: Sequence[tuple[float, float, float, float]], place: str
) -> list[Region]:
    """One region a subject, whose prompt describes the whole picture as if that subject stood at every place.

    The base draws what a prompt says of a whole picture: told of one subject alone, it draws one large subject over
    several regions.
    """
    return [
        Region(prompt_together([subject] * len(boxes), place), box=box)
        for subject, box in zip(subjects, boxes, strict=True)
    ]


def is_colour(attribute: str) -> bool:
    """Whether an attribute names a colour; others are shapes, numbers and patterns."""
    return attribute == "colour" or attribute.endswith("_colour")


def share_of_looks(read: Sequence[Mapping[str, str]], subject: Subject, counts: Callable[[str], bool]) -> float:
    """Share of those attributes read right that count, such as shapes alone."""
    wanted = {name: value for name, value in subject.attributes.items() if counts(name)}
    return metrics.attribute_accuracy(read, wanted)


def summarise_regions(pictures: Sequence[InRegions]) -> dict[str, dict[str, float]]:
    """Mean of every measure over pictures, with its 95 % interval, see `mean_with_interval`."""
    values = {
        "right": [picture.right for picture in pictures],
        "whole_pictures": [float(picture.right == 1) for picture in pictures],
        "looks": [picture.looks for picture in pictures],
        "likeness": [picture.likeness for picture in pictures],
    }
    return {name: mean_with_interval(each) for name, each in values.items()}


def confusion(pictures: Sequence[InRegions], expected: Sequence[Sequence[str]]) -> dict[str, dict[str, int]]:
    """How often a concept was found where one was asked for: asked for, found, times."""
    counts: dict[str, dict[str, int]] = {}
    for picture, names in zip(pictures, expected, strict=True):
        for name, found in zip(names, picture.found, strict=True):
            row = counts.setdefault(name, {})
            row[found] = row.get(found, 0) + 1
    return counts
