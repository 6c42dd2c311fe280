"""Cast fused updates to half precision without overflow or underflow when A and B differ much in magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from diffusers_mixofshow.edlora import LowRank


def cast_updates(lora: Mapping[str, LowRank], dtype: torch.dtype) -> dict[str, LowRank]:
    """Cast the updates of sites to another dtype after balancing the magnitudes of their factors."""
    return {site: _cast(update, dtype) for site, update in lora.items()}


def _cast(update: LowRank, dtype: torch.dtype) -> LowRank:
    """Scale row k of down and column k of up to similar magnitude, by powers of two, which is exact; then cast."""
    if update.down.dtype == update.up.dtype == dtype:
        return update
    rows, columns = update.down.abs().amax(dim=1), update.up.abs().amax(dim=0)  # (rank,) each
    present = (rows > 0) & (columns > 0)
    shift = torch.where(present, (columns.log2() - rows.log2()) / 2, 0.0).nan_to_num().round()
    down = torch.ldexp(update.down, shift[:, None])
    up = torch.ldexp(update.up, -shift)
    return replace(update, down=down.to(dtype), up=up.to(dtype))
