"""Gradient checkpointing, `torch.compile` and a faster forward pass of LoRA layers, each a context manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusers_mixofshow.lora import TrainableLoRA


_SETTINGS = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")


@contextmanager
def recompute_activations(*models: nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing on in diffusers and transformers models inside the block, and off afterwards.

    A block of a transformers model checkpoints only in training mode. It alone gets that mode, not its children, so
    that their dropout stays off.
    """
    blocks = [module for model in models for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    before = [{name: vars(block)[name] for name in _SETTINGS if name in vars(block)} for block in blocks]
    try:
        for block in blocks:
            vars(block).update(gradient_checkpointing=True, _gradient_checkpointing_func=_checkpoint, training=True)
        yield
    finally:
        for block, settings in zip(blocks, before, strict=True):
            for name in _SETTINGS:
                vars(block).pop(name, None)
            vars(block).update(settings)


_checkpoint: Any = partial(checkpoint, use_reentrant=False)


@contextmanager
def compile_model(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model compiled by torch, with the same weights; attributes that compiling adds are removed again."""
    before = set(vars(model))
    try:
        made: Any = torch.compile(model)
        yield made
    finally:
        for mark in set(vars(model)) - before:
            delattr(model, mark)


@contextmanager
def speed_up_updates(lora: TrainableLoRA) -> Iterator[None]:
    """Compute W x + s B A x in fewer passes over the activations than PEFT's layers do, inside the block.

    The scale s multiplies A x, which is small (the rank's size), and one kernel multiplies by B and adds. While other
    adapters are active in a layer, or its adapters are disabled, it uses PEFT's own forward pass.
    """
    layers = list(lora.layers.values())
    before = [{"forward": vars(layer)["forward"]} if "forward" in vars(layer) else {} for layer in layers]
    try:
        for layer in layers:
            vars(layer)["forward"] = _make_fast_forward(layer, lora.adapter_name)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            vars(layer).update(own)


def _make_fast_forward(layer: Any, adapter: str) -> Callable[[torch.Tensor], torch.Tensor]:
    usual: Callable[[torch.Tensor], torch.Tensor] = layer.forward
    base = layer.get_base_layer()
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        if layer.disable_adapters or list(layer.active_adapters) != [adapter]:
            return usual(inputs)
        low = F.linear(inputs, down) * layer.scaling[adapter]  # read in every call: samples are drawn at other scales
        output: torch.Tensor = base(inputs)
        return torch.addmm(output.flatten(0, -2), low.flatten(0, -2), up.t()).view_as(output)

    return forward
