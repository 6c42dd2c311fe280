"""What the centre needs to fuse a concept without a model, recorded beside what was tuned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_mixofshow.fusion import GradientFuser
from diffusers_mixofshow.pipelines import choose_pipeline
from diffusers_mixofshow.training.base import with_same_models


if TYPE_CHECKING:
    from diffusers_mixofshow.training.base import TrainablePipeline


def record_statistics(pipeline: TrainablePipeline, folder: Path) -> None:
    """Record fusion statistics with every setting at its default, so that they serve every fusion at the defaults.

    Args:
        pipeline: The base that the concept was tuned on, as it was before.
        folder: Where the ED-LoRA lies; all processes call it together.
    """
    kind = choose_pipeline(pipeline.components)
    if not isinstance(pipeline, kind):
        bars = getattr(pipeline, "_progress_bar_config", {})
        pipeline = with_same_models(pipeline, kind)
        pipeline.set_progress_bar_config(**bars)
    GradientFuser(pipeline).record(folder)
