"""Tuning one concept on a handful of photos: config, data, losses, trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from diffusers_mixofshow.training.config import TrainingConfig
    from diffusers_mixofshow.training.loop import StepReport
    from diffusers_mixofshow.training.trainer import EDLoRATrainer

__all__ = ["EDLoRATrainer", "StepReport", "TrainingConfig"]

_HOMES = {"EDLoRATrainer": "trainer", "StepReport": "loop", "TrainingConfig": "config"}


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used, so that importing the package stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
