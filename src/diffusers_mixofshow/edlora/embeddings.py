"""How a concept's embeddings are named: by its token, and in front of that what they are for.

A token of Stable Diffusion has embeddings for one text encoder, which are called ``<potter1>``. A token of SDXL has
``<potter1>`` for the first, ``text_encoder_2.<potter1>`` for the second, and ``pooled.<potter1>`` for the vector of
the whole text; see `Family.embedding_parts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from diffusers_mixofshow.families import FAMILIES, Family
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION


_Rows = TypeVar("_Rows")


def named(token: str, part: str = "") -> str:
    """What a token's embeddings for a part are called."""
    return f"{part}.{token}" if part else token


def part_and_token(name: str) -> tuple[str, str]:
    """What the embeddings of a name are for, empty for the first text encoder, and their token."""
    part, bracket, rest = name.partition("<")
    return part.removesuffix("."), bracket + rest


def family_of_embeddings(names: Iterable[str]) -> Family:
    """The family whose concepts have embeddings for what these are for; without any that of Stable Diffusion."""
    parts = {"", *(part_and_token(name)[0] for name in names)}
    able = [family for family in FAMILIES if family.cross_attention and set(family.embedding_parts) == parts]
    return able[0] if able else STABLE_DIFFUSION


def rows_of(embeddings: Mapping[str, _Rows], parts: Sequence[str]) -> dict[str, list[_Rows]]:
    """Token to its embeddings for these parts, in their order; tokens that lack one are left out."""
    tokens = dict.fromkeys(part_and_token(name)[1] for name in embeddings)
    return {
        token: [embeddings[named(token, part)] for part in parts]
        for token in tokens
        if all(named(token, part) in embeddings for part in parts)
    }


def rows_for(text_encoder: str, embeddings: Mapping[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """Token to its embeddings for one of a family's text encoders, that for the vector of the whole text the last."""
    parts = [part for part, name in family.embedding_parts.items() if name == text_encoder]
    return {token: torch.cat(rows) for token, rows in rows_of(embeddings, parts).items()}
