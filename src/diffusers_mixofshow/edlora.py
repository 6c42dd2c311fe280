"""The ED-LoRA: one concept, or several fused ones, as data. Knows nothing about models or files' transport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from diffusers_mixofshow.concepts import Concept, check_distinct


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """One layer's low-rank update; the weight changes by ``alpha / rank * up @ down``.

    Args:
        down: PEFT's ``lora_A``, the paper's A, shape (rank, in_features).
        up: PEFT's ``lora_B``, the paper's B, shape (out_features, rank).
        alpha: PEFT's ``lora_alpha``; the update is scaled by alpha / rank.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Number of rows of `down`."""
        return self.down.shape[0]

    @property
    def scaling(self) -> float:
        """The factor in front of ``up @ down``: alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class EDLoRA:
    """Embedding-decomposed LoRA of one or several concepts (arXiv:2305.18292, section 3.3.1).

    Args:
        concepts: The concepts it holds; one after tuning, several after fusion.
        embeddings: Token to its layer-wise embedding, shape (layers, dim), in the order of `layers`.
        lora: Site name (see `sites`) to its low-rank update.
        base_model: Id of the model it was tuned on.
        layers: The U-Net's cross-attention layers in order down, mid, up.
        training: Settings and measurements of the tuning or fusion, JSON values only.
    """

    concepts: tuple[Concept, ...]
    embeddings: Mapping[str, torch.Tensor]
    lora: Mapping[str, LowRank]
    base_model: str
    layers: tuple[str, ...]
    training: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse concepts that share a name."""
        check_distinct(self.concepts)
