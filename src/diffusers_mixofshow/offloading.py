"""Models whose weights lie elsewhere between their turns: where they compute, and how they take to changed layers."""

from __future__ import annotations

import torch
from diffusers.hooks.group_offloading import (
    GroupOffloadingType,
    _get_top_level_group_offload_hook,
    _maybe_remove_and_reapply_group_offloading,
)
from torch import nn


def brought_to(layer: nn.Module, model: nn.Module) -> torch.device | None:
    """Where offloading brings a layer's weights for its turn; None where nothing brings the layer's alone.

    Args:
        layer: A layer of the model, as it was before anything was wrapped around it.
        model: The component of a pipeline that has the layer.
    """
    group = _get_top_level_group_offload_hook(model)
    if group is not None:
        return torch.device(group.config.onload_device)
    hook = getattr(layer, "_hf_hook", None)  # accelerate's
    devices = (getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,)))
    return next((torch.device(device) for device in devices if device is not None), None)


def follow_changed_layers(model: nn.Module) -> None:
    """Make group offloading note what a model's layers are now, where it keeps a list of the weights of whole blocks.

    It does so for streams, whose copies are made in advance, and stumbles over weights that are not on the list.
    """
    group = _get_top_level_group_offload_hook(model)
    if group is None:
        return
    config = group.config
    in_blocks = config.offload_type == GroupOffloadingType.BLOCK_LEVEL
    if in_blocks and config.stream is not None and config.offload_to_disk_path is None:
        _maybe_remove_and_reapply_group_offloading(model)
