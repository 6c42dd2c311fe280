"""Prompts of regions as a base understands them: of a whole picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from diffusers_mixofshow.concepts import Concept, mentions_concept, replace_mention
from diffusers_mixofshow.regions.region import Region


def repeat_subjects(regions: Sequence[Region], concepts: Sequence[Concept]) -> list[Region]:
    """Let every region's prompt name its concept once for each region that names one.

    A base draws what a text describes as a whole picture, so "a <rex>, in a meadow" in one of three regions becomes
    "a <rex> dog, a <rex> dog and a <rex> dog, in a meadow". Regions without a concept stay as they are.

    Args:
        regions: Those of one picture.
        concepts: The loaded concepts.
    """
    places = sum(mentions_concept(region.prompt, concepts) for region in regions)

    def together(article: str, concept: Concept) -> str:
        *others, last = [f"{'a ' if article else ''}{concept.placeholder} {concept.class_word}"] * places
        return f"{', '.join(others)} and {last}"

    if places < 2:
        return list(regions)
    return [replace(region, prompt=replace_mention(region.prompt, concepts, together)) for region in regions]
