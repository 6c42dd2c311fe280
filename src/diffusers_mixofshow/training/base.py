"""The base model that is trained on: load it, refuse one that cannot be trained, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from diffusers_mixofshow.base_models import dtype_argument, embedded_base, require_family
from diffusers_mixofshow.edlora import models
from diffusers_mixofshow.errors import ConfigurationError, warn
from diffusers_mixofshow.families import CONCEPT_FAMILIES, Family, family_of
from diffusers_mixofshow.families.layers import configured_size
from diffusers_mixofshow.interop.checkpoint import refuse_single_file
from diffusers_mixofshow.lora import keep_gradient_flags
from diffusers_mixofshow.training.config import TrainingConfig


if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    TrainablePipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline

_KEPT = ("force_zeros_for_empty_prompt",)
"""Settings in a pipeline's config that change its pictures."""


def load_base(config: TrainingConfig) -> TrainablePipeline:
    """Load the base model that the config names, in the config's precision (an embedded base always in float32)."""
    name = config.pretrained_model_name_or_path
    refuse_single_file(name)
    dtypes = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = torch.float32 if embedded_base(name) else dtypes[config.mixed_precision]
    return models.load_base(name, partial(_load, dtype=dtype))


def convert_pipeline(pipeline: Any, pipeline_class: type[Any], **changed: Any) -> Any:
    """Make a pipeline of another class from the same components; `changed` replaces some of them."""
    family = family_of(pipeline.components)
    parts = {name: getattr(pipeline, name) for name in family.parts}
    kept = {name: pipeline.config[name] for name in _KEPT if name in pipeline.config}
    return pipeline_class(**parts | changed | kept | dict(family.unmarked))


def tokenizers_of(pipeline: Any) -> list[Any]:
    """The tokenizers of a pipeline's text encoders, in their order."""
    components = pipeline.components
    return [components[reading.tokenizer] for reading in family_of(components).text_encoders.values()]


def stock_class(family: Family) -> type[Any]:
    """diffusers' own text-to-image pipeline of a family."""
    import diffusers

    kind: type[Any] = getattr(diffusers, family.pipeline)
    return kind


def refuse_other_families(called: str, family: Family) -> None:
    """Raise a `ConfigurationError` if concepts cannot be tuned on a family; `called` is the error's subject."""
    if family not in CONCEPT_FAMILIES:
        able = ", ".join(one.name for one in CONCEPT_FAMILIES)
        raise ConfigurationError(
            f"{called} cannot be trained: it is of {family.name}, whose concepts are not tuned; expected one of "
            f"{able}."
        )


def refuse_untrainable(pipeline: TrainablePipeline, config: TrainingConfig) -> None:
    """Raise one `ConfigurationError` that lists why this pipeline cannot be trained with this config."""
    components, family = pipeline.components, family_of(pipeline.components)
    refuse_other_families("This pipeline", family)
    defects = [f"it has no {name}" for name in family.parts if components.get(name) is None]
    settings = getattr(components.get(family.denoiser), "config", family.marks)
    defects += [
        f"its U-Net's {name} is {settings.get(name)!r}, but {value!r} in {family.name}"
        for name, value in family.marks.items()
        if settings.get(name) != value
    ]
    modules = {name: module for name, module in components.items() if isinstance(module, nn.Module)}
    offloaded = [name for name, module in modules.items() if hasattr(module, "_hf_hook")]
    if offloaded:
        defects.append(f"{', '.join(offloaded)} are offloaded; call pipeline.remove_all_hooks() first")
    halves = [name for name in family.components if name in modules and _is_half(modules[name])]
    if halves and config.mixed_precision == "no":
        defects.append(f"{', '.join(halves)} are in half precision; load it in float32 or set mixed_precision")
    scheduler: Any = components.get("scheduler")
    if scheduler is not None and "beta_schedule" not in scheduler.config:
        defects.append(f"its scheduler, {type(scheduler).__name__}, has no betas by which noise could be added")
    if not defects and pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        defects.append(f"its U-Net takes {pipeline.unet.config.in_channels} channels (an inpainting model?)")
    if defects:
        raise ConfigurationError("This pipeline cannot be trained: " + "; ".join(defects))


def _load(place: str, *, dtype: torch.dtype, **options: Any) -> Any:
    """Load a folder or cached repository as diffusers' pipeline of its family."""
    from diffusers import DiffusionPipeline

    family = require_family(place, DiffusionPipeline.load_config(place, **options))
    refuse_other_families(f"The base model {place!r}", family)
    return stock_class(family).from_pretrained(place, **dtype_argument(dtype), **family.unmarked, **options)


def warn_of_small_pictures(pipeline: Any, config: TrainingConfig) -> None:
    """Warn if `resolution` is at most half the base's own size: a base draws small pictures badly.

    Warns:
        MixOfShowWarning: Names both sizes.
    """
    size = configured_size(pipeline.unet)
    own = 0 if size is None else pipeline.vae_scale_factor * min(size)
    if 2 * config.resolution <= own:
        warn(
            f"The base draws pictures of {own} pixels, but resolution is {config.resolution}: it knows little of so "
            f"small ones. resolution={own} is its own size."
        )


@contextmanager
def borrow(pipeline: TrainablePipeline) -> Iterator[None]:
    """Freeze every model in evaluation mode inside the block; afterwards gradient flags and modes are restored."""
    models = nn.ModuleList(module for module in pipeline.components.values() if isinstance(module, nn.Module))
    modes = [(module, module.training) for module in models.modules()]
    with keep_gradient_flags(models):
        try:
            models.requires_grad_(False).eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _is_half(module: nn.Module) -> bool:
    return next(module.parameters()).dtype in (torch.float16, torch.bfloat16)
