"""Families of base models: one module describes each, and no other code names their components or layers."""

from diffusers_mixofshow.families.family import BaseModel, Family, Stage, TextEncoder
from diffusers_mixofshow.families.recognition import (
    CONCEPT_FAMILIES,
    FAMILIES,
    family_of,
    family_of_index,
    family_of_sites,
)


__all__ = [
    "CONCEPT_FAMILIES",
    "FAMILIES",
    "BaseModel",
    "Family",
    "Stage",
    "TextEncoder",
    "family_of",
    "family_of_index",
    "family_of_sites",
]
