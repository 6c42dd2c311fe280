"""Families of base models with which prompts are drawn by diffusers' own pipeline, but no concepts and no regions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from diffusers_mixofshow.base_models import known_family
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families import CONCEPT_FAMILIES, Family


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA


def find_other_family(base: str, packs: Iterable[EDLoRA]) -> Family | None:
    """The family of a base model with which no concepts are drawn; None for any other base.

    Args:
        base: Its name.
        packs: What is loaded into it; tells the family of a base that is not known by its name or its folder.
    """
    from diffusers_mixofshow.edlora.low_rank import input_widths
    from diffusers_mixofshow.families.recognition import family_of_updates

    family = known_family(base)
    if family is None:
        plain = next((pack for pack in packs if pack.lora and not pack.concepts), None)
        family = family_of_updates(input_widths(plain.lora)) if plain else None
    return None if family is None or family.concept_pipeline else family


def make_refusal(base: str, family: Family, refused: str = "concepts, regions") -> ConfigurationError:
    """The error for what is not drawn with a base model of another family."""
    able = " or ".join(one.name for one in CONCEPT_FAMILIES)
    return ConfigurationError(
        f"The base model {base!r} is of {family.name}, with which no {refused} are drawn, only prompts, also with "
        f"plain LoRAs. Leave them out, or take a base of {able}."
    )
