"""Errors of a training that cannot go on, with the settings that would let it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from diffusers_mixofshow.base_models import base_model_of
from diffusers_mixofshow.errors import ConfigurationError, first_line
from diffusers_mixofshow.families import BaseModel
from diffusers_mixofshow.training.config import TrainingConfig


_FEW_PICTURES = 1


def make_divergence_error(seen: str, config: TrainingConfig) -> ConfigurationError:
    """Make the error for a diverged training; `seen` is its first clause, about the loss."""
    rates = ["embedding_learning_rate", "learning_rate", "text_encoder_learning_rate"]
    rates += ["text_kv_learning_rate"] if config.text_kv_learning_rate else []
    advice = [f"lower {', '.join(rates[:-1])} and {rates[-1]} to a third"]
    if config.mixed_precision == "fp16":
        advice.append("use mixed_precision='bf16' or 'no'")
    if not config.lr_warmup_steps:
        advice.append("set lr_warmup_steps, for example to a tenth of the steps")
    kept = (
        f"Checkpoints in {config.output_dir} are from before that; with lower rates and nothing else changed, "
        "resume_from_checkpoint='latest' goes on from the newest. "
    )
    has_checkpoints = config.output_dir is not None and config.checkpointing_steps is not None
    return ConfigurationError(
        f"{seen}, so the training diverged. "
        + (kept if has_checkpoints else "")
        + f"To get through it: {'; '.join(advice)}."
    )


@contextmanager
def explain_memory_errors(config: TrainingConfig, components: Callable[[], Mapping[str, object]]) -> Iterator[None]:
    """Turn an out-of-memory error of the GPU inside the block into one that names settings which need less memory.

    Args:
        config: The settings.
        components: Gives ``pipeline.components``, or nothing as long as the base model is not loaded.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        less = list_memory_savings(config, base_model_of(config.pretrained_model_name_or_path, components()))
        advice = "; ".join(less) if less else "train on a GPU with more memory, or on the CPU"
        raise ConfigurationError(
            f"The GPU's memory does not suffice for these settings ({first_line(error)}). Try, in this order: "
            f"{advice}."
        ) from error


def list_memory_savings(config: TrainingConfig, base: BaseModel) -> list[str]:
    """List settings that would lower the memory a training on a base model needs, those that cost no quality first."""
    found = []
    if config.mixed_precision == "no":
        found.append("mixed_precision='bf16' (or 'fp16' on older GPUs) halves the model")
    if not config.gradient_checkpointing:
        found.append("gradient_checkpointing=True, a third slower")
    if config.captions_per_step is None and config.train_batch_size > 1:
        found.append("captions_per_step=1, so that one caption a step is encoded for all layers")
    if config.train_batch_size > _FEW_PICTURES:
        accumulated = config.train_batch_size * config.gradient_accumulation_steps
        found.append(f"train_batch_size=1 with gradient_accumulation_steps={accumulated}, the same gradients")
    if config.optimizer.lower() in ("adamw", "adam"):
        found.append(f"optimizer='{config.optimizer}8bit' (bitsandbytes)")
    least = base.least_resolution
    if config.resolution > least:
        found.append(f"resolution={least}")
    return found
