"""Fused updates in half precision, without loss where the two halves of an update are of different sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from diffusers_mixofshow.edlora import LowRank


def in_dtype(lora: Mapping[str, LowRank], dtype: torch.dtype) -> dict[str, LowRank]:
    """The updates in another dtype, each first balanced so that no value over- or underflows.

    Args:
        lora: Site name to update.
        dtype: Such as float16.
    """
    return {site: _cast(update, dtype) for site, update in lora.items()}


def _cast(update: LowRank, dtype: torch.dtype) -> LowRank:
    """Row k of down and column k of up are given the same size; powers of two, so that this rounds nothing."""
    if update.down.dtype == update.up.dtype == dtype:
        return update
    rows, columns = update.down.abs().amax(dim=1), update.up.abs().amax(dim=0)  # (rank,) each
    present = (rows > 0) & (columns > 0)
    shift = torch.where(present, (columns.log2() - rows.log2()) / 2, 0.0).nan_to_num().round()
    down = torch.ldexp(update.down, shift[:, None])
    up = torch.ldexp(update.up, -shift)
    return replace(update, down=down.to(dtype), up=up.to(dtype))
