"""Record a concept's fusion statistics after training, so that it can be fused without a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_mixofshow.fusion import GradientFuser
from diffusers_mixofshow.pipelines import choose_pipeline
from diffusers_mixofshow.training.base import convert_pipeline


if TYPE_CHECKING:
    from diffusers_mixofshow.training.base import TrainablePipeline


def record_statistics(pipeline: TrainablePipeline, folder: Path) -> None:
    """Record fusion statistics with the default settings, which any fusion with default settings can use.

    All processes call it together.

    Args:
        pipeline: The base model that the concept was tuned on, restored after training.
        folder: The folder of the saved ED-LoRA.
    """
    kind = choose_pipeline(pipeline.components)
    if not isinstance(pipeline, kind):
        bars = getattr(pipeline, "_progress_bar_config", {})
        pipeline = convert_pipeline(pipeline, kind)
        pipeline.set_progress_bar_config(**bars)
    GradientFuser(pipeline).record(folder)
