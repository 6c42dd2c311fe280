"""Check that a pipeline can be used for fusion, that is samples from a prompt alone, and set aside what it has."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.families import FAMILIES, family_of
from diffusers_mixofshow.families.recognition import is_denoiser_of


def refuse_unfusable(pipe: Any) -> None:
    """Refuse an object that is not a pipeline usable for fusion; None, for fusing without one, is accepted.

    Raises:
        FusionError: Says what was given, and how to get a usable pipeline.
    """
    if pipe is not None and (defect := _defect(pipe)):
        raise FusionError(f"GradientFuser needs a loaded MixOfShowPipeline, got {defect}.")


def _defect(pipe: Any) -> str:
    if isinstance(pipe, str | os.PathLike):
        return f"{os.fspath(pipe)!r}. Load it: MixOfShowPipeline.from_pretrained({os.fspath(pipe)!r})"
    if isinstance(pipe, type):
        return f"the class {pipe.__name__}. Load one: {pipe.__name__}.from_pretrained('user/base')"
    name, components = type(pipe).__name__, getattr(pipe, "components", None)
    if not isinstance(components, dict) or not callable(pipe):
        return f"a {name}, which is not a pipeline"
    family = family_of(components)
    if not family.pipeline:
        return (
            f"a {name}: {family.name} has only a modular pipeline, which cannot be recorded. Merge its LoRAs without "
            "a pipeline, by a method that uses the updates alone: GradientFuser().fuse(..., method='average')"
        )
    if missing := [part for part in family.parts if components.get(part) is None]:
        return f"a {name} without {', '.join(missing)}; expected a pipeline of {_list_families()}"
    if not is_denoiser_of(components[family.denoiser], family):
        kind = type(components[family.denoiser]).__name__
        return f"a {name} with a {kind}; expected a pipeline of {_list_families()}"
    if name != family.pipeline and "image" in inspect.signature(pipe.__call__).parameters:
        ours = family.concept_pipeline or family.pipeline
        return f"a {name}, which needs an input image. Give {ours}.from_pipe(pipe), which shares its models"
    return ""


def refuse_concepts(pipe: Any, edloras: Iterable[EDLoRA]) -> None:
    """Refuse ED-LoRAs with concepts for a pipeline that cannot load them.

    Raises:
        FusionError: Says how to get a pipeline that can, if there is one.
    """
    from diffusers_mixofshow.lora import loads_concepts

    if loads_concepts(pipe) or not any(edlora.concepts for edlora in edloras):
        return
    family = family_of(pipe.components)
    able, kind = family.concept_pipeline, type(pipe).__name__
    advice = f"Only plain LoRAs of {family.name} can be fused; concepts need Stable Diffusion or SDXL"
    if able:
        advice = f"Give {able}.from_pipe(pipe), which shares its models"
    raise FusionError(
        f"GradientFuser needs a loaded {able or 'MixOfShowPipeline'}, got a {kind}, which cannot load concepts. "
        f"{advice}."
    )


@contextmanager
def set_aside(pipe: Any) -> Iterator[None]:
    """Unload what the user has loaded into a pipeline, inside the block.

    Raises:
        FusionError: If LoRAs are loaded that the pipeline cannot unload and restore.
    """
    from diffusers_mixofshow.lora import adapter_names, loads_concepts

    if loads_concepts(pipe):
        with pipe.set_concepts_aside():
            yield
        return
    if names := adapter_names(pipe.components):
        raise FusionError(
            f"The pipeline has LoRAs loaded ({', '.join(sorted(names))}), which would be recorded as part of the "
            "base. Call pipe.unload_lora_weights() first."
        )
    yield


def _list_families() -> str:
    """Names of the families that can be fused."""
    return ", ".join(family.name for family in FAMILIES if family.pipeline)
