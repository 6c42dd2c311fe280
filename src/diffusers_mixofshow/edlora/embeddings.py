"""Names of a concept's embeddings: the part of the model that reads them, then the token.

A token of Stable Diffusion has embeddings for one text encoder, named ``<potter1>``. A token of SDXL has ``<potter1>``
for the first, ``text_encoder_2.<potter1>`` for the second, and ``pooled.<potter1>`` for the pooled vector of the whole
text; see `Family.embedding_parts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from diffusers_mixofshow.families import FAMILIES, Family
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION


_Rows = TypeVar("_Rows")


def join_name(token: str, part: str) -> str:
    """Name of a token's embeddings for a part; the reverse of `split_name`."""
    return f"{part}.{token}" if part else token


def split_name(name: str) -> tuple[str, str]:
    """Split a name of embeddings into part, empty for the first text encoder, and token."""
    part, bracket, rest = name.partition("<")
    return part.removesuffix("."), bracket + rest


def family_of_embeddings(names: Iterable[str]) -> Family:
    """The family whose concepts have embeddings for the same parts; Stable Diffusion if there is none."""
    parts = {"", *(split_name(name)[0] for name in names)}
    able = [family for family in FAMILIES if family.cross_attention and set(family.embedding_parts) == parts]
    return able[0] if able else STABLE_DIFFUSION


def rows_of(embeddings: Mapping[str, _Rows], parts: Sequence[str]) -> dict[str, list[_Rows]]:
    """Token to its embeddings for these parts, in order; tokens that lack one are left out."""
    tokens = dict.fromkeys(split_name(name)[1] for name in embeddings)
    return {
        token: [embeddings[join_name(token, part)] for part in parts]
        for token in tokens
        if all(join_name(token, part) in embeddings for part in parts)
    }


def rows_for(text_encoder: str, embeddings: Mapping[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """Token to its embeddings for one text encoder: layer-wise rows, then the row for the pooled vector, if any."""
    parts = [part for part, name in family.embedding_parts.items() if name == text_encoder]
    return {token: torch.cat(rows) for token, rows in rows_of(embeddings, parts).items()}
