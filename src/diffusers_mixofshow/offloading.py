"""Offloaded models, whose weights are on the device only while they compute: the device, and changes of layers."""

from __future__ import annotations

import torch
from diffusers.hooks.group_offloading import (
    GroupOffloadingType,
    _get_top_level_group_offload_hook,
    _maybe_remove_and_reapply_group_offloading,
)
from torch import nn


def find_onload_device(layer: nn.Module, model: nn.Module) -> torch.device | None:
    """The device that offloading moves a layer's weights to; None if offloading does not move this layer by itself.

    Args:
        layer: A layer of the model, without any wrapper such as PEFT's LoRA layer.
        model: The component of a pipeline that has the layer.
    """
    group = _get_top_level_group_offload_hook(model)
    if group is not None:
        return torch.device(group.config.onload_device)
    hook = getattr(layer, "_hf_hook", None)  # accelerate's
    devices = (getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,)))
    return next((torch.device(device) for device in devices if device is not None), None)


def follow_changed_layers(model: nn.Module) -> None:
    """Apply block-level group offloading anew after layers of the model were added or removed.

    With a stream it copies a block's weights in advance by a list, and fails on weights that are not on that list.
    """
    group = _get_top_level_group_offload_hook(model)
    if group is None:
        return
    config = group.config
    in_blocks = config.offload_type == GroupOffloadingType.BLOCK_LEVEL
    if in_blocks and config.stream is not None and config.offload_to_disk_path is None:
        _maybe_remove_and_reapply_group_offloading(model)
