"""The client's whole step: a concept is tuned, and beside it goes what the centre needs to fuse it without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.fusion import GradientFuser
from diffusers_mixofshow.pipelines import MixOfShowPipeline
from diffusers_mixofshow.training.loop import StepReport
from diffusers_mixofshow.training.trainer import EDLoRATrainer


if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from diffusers_mixofshow.training.config import TrainingConfig


def tune_concept(
    config: TrainingConfig,
    pipeline: StableDiffusionPipeline | None = None,
    *,
    on_step: Callable[[StepReport], None] | None = None,
) -> EDLoRA:
    """Tune a concept and, if the config has a folder and wants them, record its fusion statistics beside it.

    Args:
        config: All settings; `save_statistics` switches the statistics.
        pipeline: A loaded pipeline to borrow; None loads the config's base model.
        on_step: See `EDLoRATrainer`.

    Returns:
        The ED-LoRA, as `EDLoRATrainer.train` gives it and with its errors.
    """
    trainer = EDLoRATrainer(config, pipeline, on_step=on_step)
    edlora = trainer.train()
    if config.save_statistics and config.output_dir is not None:
        # With every setting at its default, so that whoever fuses at the defaults is served.
        GradientFuser(_with_concepts(trainer.pipeline)).record(Path(config.output_dir))
    return edlora


def _with_concepts(pipeline: Any) -> MixOfShowPipeline:
    """The same models in a pipeline that can load concepts."""
    if isinstance(pipeline, MixOfShowPipeline):
        return pipeline
    joined = MixOfShowPipeline(
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=pipeline.unet,
        scheduler=pipeline.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    joined.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return joined
