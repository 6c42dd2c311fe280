"""Tuning one concept on a handful of photos: config, data, losses, trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers_mixofshow.lazy import import_lazily


if TYPE_CHECKING:
    from diffusers_mixofshow.training.config import TrainingConfig
    from diffusers_mixofshow.training.loop import StepReport
    from diffusers_mixofshow.training.trainer import EDLoRATrainer

__all__ = ["EDLoRATrainer", "StepReport", "TrainingConfig"]

__getattr__ = import_lazily(
    __name__, {"config": ("TrainingConfig",), "loop": ("StepReport",), "trainer": ("EDLoRATrainer",)}
)
