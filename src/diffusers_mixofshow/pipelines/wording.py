"""Rewrite the prompts of regions for base models, which take every prompt as that of a whole picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from diffusers_mixofshow.concepts import Concept, mentions_concept, replace_mention
from diffusers_mixofshow.regions.region import Region


def repeat_subjects(regions: Sequence[Region], concepts: Sequence[Concept]) -> list[Region]:
    """Let every region's prompt repeat its concept as often as regions with a concept are in the picture.

    A base draws what a text describes as a whole picture, so "a <rex>, in a meadow" in one of three regions becomes
    "a <rex> dog, a <rex> dog and a <rex> dog, in a meadow". Regions without a concept stay as they are.

    Args:
        regions: The regions of one picture.
        concepts: The loaded concepts.
    """
    count = sum(mentions_concept(region.prompt, concepts) for region in regions)

    def repeat(article: str, concept: Concept) -> str:
        *others, last = [f"{'a ' if article else ''}{concept.placeholder} {concept.class_word}"] * count
        return f"{', '.join(others)} and {last}"

    if count < 2:
        return list(regions)
    return [replace(region, prompt=replace_mention(region.prompt, concepts, repeat)) for region in regions]
