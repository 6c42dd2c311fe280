"""Scale ControlNets and T2I-Adapters by region."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffusers_mixofshow.conditioning.canvas import Canvas
from diffusers_mixofshow.conditioning.passes import hook_passes


_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


@contextmanager
def regional_control(unet: nn.Module, canvas: Canvas) -> Iterator[None]:
    """Multiply the features that ControlNets and adapters add to a U-Net by each region's `control_scale`.

    Args:
        unet: The U-Net; a hook that adds features must have been set before.
        canvas: The regions on the U-Net's feature maps, see `regional_attention`.
    """

    def scale(feature: torch.Tensor) -> torch.Tensor:
        scales = canvas.blend(lambda region: region.control_scale, 1.0, *feature.shape[-2:]).to(feature)
        return feature * scales.repeat(len(feature) // len(scales), 1, 1, 1)

    def scale_residuals(inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        changed = {
            name: scale(value) if isinstance(value, torch.Tensor) else [scale(feature) for feature in value]
            for name, value in named.items()
            if name in _RESIDUALS and value is not None
        }
        return inputs, {**named, **changed}

    if all(region.control_scale == 1 for region in canvas.regions()):
        yield
        return
    with hook_passes(unet, scale_residuals):
        yield
