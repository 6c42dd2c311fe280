"""Data type of one layer's low-rank update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """One layer's low-rank update; the weight changes by ``alpha / rank * up @ down``.

    Args:
        down: PEFT's ``lora_A``, the paper's A, shape (rank, in_features).
        up: PEFT's ``lora_B``, the paper's B, shape (out_features, rank).
        alpha: PEFT's ``lora_alpha``; the update is scaled by alpha / rank.
        convolution: Whether the layer is a 1 x 1 convolution, whose factors have two more axes of size 1 in files.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    convolution: bool = False

    @classmethod
    def from_file(cls, down: torch.Tensor, up: torch.Tensor, alpha: float) -> LowRank:
        """Make an update from the tensors of a file, of a linear layer or a 1 x 1 convolution."""
        flat = [half[:, :, 0, 0] if half.dim() == 4 and half.shape[2:] == (1, 1) else half for half in (down, up)]
        return cls(down=flat[0], up=flat[1], alpha=alpha, convolution=flat[0] is not down)

    @property
    def in_file(self) -> tuple[torch.Tensor, torch.Tensor]:
        """down and up as stored in files, on the CPU; the reverse of `from_file`."""
        down, up = (half.detach().cpu().contiguous() for half in (self.down, self.up))
        return (down[:, :, None, None], up[:, :, None, None]) if self.convolution else (down, up)

    @property
    def rank(self) -> int:
        """Number of rows of `down`."""
        return self.down.shape[0]

    @property
    def scaling(self) -> float:
        """The factor in front of ``up @ down``: alpha / rank."""
        return self.alpha / self.rank

    def cast(self, dtype: torch.dtype) -> LowRank:
        """The same update in another dtype, without overflow or underflow where its halves differ much in magnitude.

        First row k of down and column k of up are scaled to similar magnitude, by powers of two, which is exact.
        """
        if self.down.dtype == self.up.dtype == dtype:
            return self
        rows, columns = self.down.abs().amax(dim=1), self.up.abs().amax(dim=0)  # (rank,) each
        present = (rows > 0) & (columns > 0)
        shift = torch.where(present, (columns.log2() - rows.log2()) / 2, 0.0).nan_to_num().round()
        down, up = torch.ldexp(self.down, shift[:, None]), torch.ldexp(self.up, -shift)
        return replace(self, down=down.to(dtype), up=up.to(dtype))

    @property
    def folded(self) -> LowRank:
        """The same update with the scaling multiplied into `up`, so that alpha is the rank.

        `up` keeps its dtype if that is exact, as for powers of two within range; otherwise it becomes float32 or
        wider, rounded once.
        """
        if self.scaling == 1:
            return self
        up = self.scaling * self.up.double()
        wide = torch.promote_types(self.up.dtype, torch.float32)
        exact = torch.equal(up.to(self.up.dtype).double(), up)
        return replace(self, up=up.to(self.up.dtype if exact else wide), alpha=float(self.rank))


def low_rank_delta(update: LowRank, *, like: torch.Tensor | None = None) -> torch.Tensor:
    """Weight change ``alpha / rank * up @ down`` of one layer, shape (out, in), in float32 or better.

    Args:
        update: The layer's update.
        like: The change is computed on this tensor's device, and in its dtype if that is wider.
    """
    like = update.up if like is None else like
    dtype = torch.promote_types(torch.promote_types(update.up.dtype, torch.float32), like.dtype)
    return update.scaling * (update.up.to(like.device, dtype) @ update.down.to(like.device, dtype))


def input_widths(lora: Mapping[str, LowRank]) -> dict[str, int]:
    """Site name to the width of the layer's input."""
    return {site: update.down.shape[-1] for site, update in lora.items()}
