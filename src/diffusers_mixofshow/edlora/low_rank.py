"""One layer's low-rank update."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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


def low_rank_delta(update: LowRank, *, like: torch.Tensor | None = None) -> torch.Tensor:
    """Weight change ``alpha / rank * up @ down`` of one layer, shape (out, in), in float32 or better.

    Args:
        update: The layer's update.
        like: A tensor on whose device, and in whose dtype if that is better still, the change is computed.
    """
    like = update.up if like is None else like
    dtype = torch.promote_types(torch.promote_types(update.up.dtype, torch.float32), like.dtype)
    return update.scaling * (update.up.to(like.device, dtype) @ update.down.to(like.device, dtype))
