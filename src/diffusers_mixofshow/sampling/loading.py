"""Load a base model to sample with: as a pipeline that draws concepts, or as the pipeline of diffusers that it is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from diffusers_mixofshow.base_models import (
    absent_parts,
    canonical_name,
    dtype_argument,
    embedded_base,
    list_devices,
    require_family,
    spell_name,
)
from diffusers_mixofshow.errors import ConfigurationError, first_line
from diffusers_mixofshow.families import CONCEPT_FAMILIES
from diffusers_mixofshow.progress import bar_settings
from diffusers_mixofshow.sampling.other_families import make_refusal


def load_base(name: str, device: str | None = None, dtype: str | None = None, *, concepts: bool = True) -> Any:
    """Load a base model as a Mix-of-Show pipeline, on the GPU in half precision where there is one.

    Args:
        name: Hub id, folder, or the name of an embedded base.
        device: Device to load to, such as ``cuda:1``.
        dtype: Name of the weights' type, such as ``float16``.
        concepts: Whether it has to draw concepts; otherwise it is loaded as the class of diffusers that its folder
            names.

    Raises:
        ConfigurationError: If it cannot be found or read, is a single file, or this machine has no such device.
        HubError: If it is only on the Hub, which cannot be reached.
    """
    from diffusers_mixofshow.edlora import models
    from diffusers_mixofshow.interop.checkpoint import refuse_single_file

    refuse_single_file(name)
    device, dtype = check_device(device, dtype)
    load = _load_for_concepts if concepts else _load_unchanged
    pipe = models.load_base(name, partial(load, device=device, dtype=dtype))
    pipe.set_progress_bar_config(desc="Sampling", **bar_settings())
    return pipe


def check_device(device: str | None, dtype: str | None) -> tuple[str, str | None]:
    """Choose the device if none is given, and raise a `ConfigurationError` if it or its dtype cannot be used here."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, dtype=getattr(torch, dtype or "float32"), device=device).sum().item()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ConfigurationError(
            f"Got --device {device}{f' --dtype {dtype}' if dtype else ''}, which this machine cannot draw with: "
            f"{first_line(error)}. Expected a device that it has ({list_devices()}); 'mixofshow doctor' tells more."
        ) from error
    return device, dtype


def _load_for_concepts(place: str, *, device: str, dtype: str | None, **options: Any) -> Any:
    """Load a base as this package's pipeline for it."""
    import torch

    half = device.startswith("cuda") and embedded_base(canonical_name(place)) is None
    weights = getattr(torch, dtype or ("float16" if half else "float32"))
    return _choose_pipeline(place, options).from_pretrained(place, dtype=weights, **options).to(device)


def _choose_pipeline(place: str, options: Mapping[str, Any]) -> type[Any]:
    """Choose the pipeline of this package that draws concepts and regions with a base model.

    Raises:
        ConfigurationError: If it is of a family with which they are not drawn, or of none that is known.
    """
    from diffusers import DiffusionPipeline

    from diffusers_mixofshow import pipelines

    family = require_family(spell_name(place), DiffusionPipeline.load_config(place, **options))
    if family not in CONCEPT_FAMILIES:
        raise make_refusal(spell_name(place), family)
    kind: type[Any] = getattr(pipelines, family.concept_pipeline)
    return kind


def _load_unchanged(place: str, *, device: str, dtype: str | None, **options: Any) -> Any:
    """Load a pipeline as the class of diffusers that its folder names, without the parts that it was saved without."""
    import diffusers
    import torch

    weights = dtype_argument(getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32")))
    index = diffusers.DiffusionPipeline.load_config(place, **options)
    try:
        return diffusers.DiffusionPipeline.from_pretrained(place, **weights, **absent_parts(index), **options).to(
            device
        )
    except AttributeError as error:
        raise ConfigurationError(
            f"The installed diffusers {diffusers.__version__} cannot load this pipeline: {first_line(error)}. Install "
            "a newer one: pip install -U diffusers."
        ) from error
