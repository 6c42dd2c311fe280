"""Time for memory, and patience for time: activations computed again for their gradients, and a compiled model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


_SETTINGS = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")


@contextmanager
def recomputed_activations(*models: nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing on in the blocks of diffusers and transformers models inside the block.

    Blocks of transformers ask for training mode as well; they get it alone, without their children, so that no
    dropout wakes. Afterwards everything is as it was.
    """
    blocks = [module for model in models for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    before = [{name: vars(block)[name] for name in _SETTINGS if name in vars(block)} for block in blocks]
    try:
        for block in blocks:
            vars(block).update(gradient_checkpointing=True, _gradient_checkpointing_func=_again, training=True)
        yield
    finally:
        for block, settings in zip(blocks, before, strict=True):
            for name in _SETTINGS:
                vars(block).pop(name, None)
            vars(block).update(settings)


_again: Any = partial(checkpoint, use_reentrant=False)


@contextmanager
def compiled(model: nn.Module) -> Iterator[nn.Module]:
    """The model compiled by torch, which shares its weights; the marks that compiling leaves are gone afterwards."""
    before = set(vars(model))
    try:
        made: Any = torch.compile(model)
        yield made
    finally:
        for mark in set(vars(model)) - before:
            delattr(model, mark)
