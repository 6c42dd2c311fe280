"""Loading the base model that is sampled with, as the pipeline that can draw concepts, or as it is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from diffusers_mixofshow.base_models import TOYLAND, devices, in_dtype, location_of
from diffusers_mixofshow.errors import ConfigurationError, first_line
from diffusers_mixofshow.families import CONCEPT_FAMILIES, family_of_index
from diffusers_mixofshow.progress import bar_settings


def load_base(name: str, device: str | None = None, dtype: str | None = None, *, concepts: bool = True) -> Any:
    """Load a base model as a Mix-of-Show pipeline, on the GPU in half precision where there is one.

    Args:
        name: Hub id, folder, or ``toyland``.
        device: Where to, such as ``cuda:1``.
        dtype: Name of the weights' type, such as ``float16``.
        concepts: Whether it has to draw concepts; otherwise it is loaded as the class of diffusers that it is.

    Raises:
        ConfigurationError: If it cannot be found or read, or this machine has no such device.
        HubError: If only the Hub has it, and that cannot be reached.
    """
    from diffusers_mixofshow.edlora import models

    device, dtype = check_device(device, dtype)
    pipe = models.load_base(name, partial(_load if concepts else _load_as_it_is, device=device, dtype=dtype))
    pipe.set_progress_bar_config(desc="Sampling", **bar_settings())
    return pipe


def check_device(device: str | None, dtype: str | None) -> tuple[str, str | None]:
    """Raise a `ConfigurationError` if this machine has no such device, or that no such numbers; else tell which."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, dtype=getattr(torch, dtype or "float32"), device=device).sum().item()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ConfigurationError(
            f"Got --device {device}{f' --dtype {dtype}' if dtype else ''}, which this machine cannot draw with: "
            f"{first_line(error)}. Expected a device that it has ({devices()}); 'mixofshow doctor' tells more."
        ) from error
    return device, dtype


def _load(place: str, *, device: str, dtype: str | None, **options: Any) -> Any:
    """Load what is known to be there; the pipelines are imported no earlier, which takes seconds."""
    import torch

    half = device.startswith("cuda") and place != location_of(TOYLAND)
    numbers = getattr(torch, dtype or ("float16" if half else "float32"))
    return _drawing_class(place, options).from_pretrained(place, dtype=numbers, **options).to(device)


def _drawing_class(place: str, options: Mapping[str, Any]) -> type[Any]:
    """The pipeline of this package that draws concepts and regions with a base model.

    Raises:
        ConfigurationError: If it is a single file, or of a family with which they are not drawn.
    """
    from diffusers import DiffusionPipeline

    from diffusers_mixofshow import pipelines

    if Path(place).is_file():
        raise ConfigurationError(
            f"The base model {place!r} is a single file. Expected a Hub id or a folder. Make one of it in Python: "
            "MixOfShowPipeline (of SDXL MixOfShowXLPipeline).from_single_file(FILE).save_pretrained(FOLDER)."
        )
    family = family_of_index(DiffusionPipeline.load_config(place, **options))
    if family not in CONCEPT_FAMILIES:
        able = ", ".join(one.name for one in CONCEPT_FAMILIES)
        raise ConfigurationError(
            f"The base model {place!r} is of {family.name}, with which concepts and regions are not drawn. Expected "
            f"one of {able}."
        )
    kind: type[Any] = getattr(pipelines, family.concept_pipeline)
    return kind


def _load_as_it_is(place: str, *, device: str, dtype: str | None, **options: Any) -> Any:
    """Load a pipeline as the class of diffusers that its folder names."""
    import diffusers
    import torch

    numbers = getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    try:
        return diffusers.DiffusionPipeline.from_pretrained(place, **in_dtype(numbers), **options).to(device)
    except AttributeError as error:
        raise ConfigurationError(
            f"The installed diffusers {diffusers.__version__} cannot load this pipeline: {first_line(error)}. Install "
            "a newer one: pip install -U diffusers."
        ) from error
