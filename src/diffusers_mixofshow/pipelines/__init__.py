"""diffusers' own pipelines, with mixins that add concepts and regions."""

from collections.abc import Mapping
from typing import Any

from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.pipelines.adapter import MixOfShowAdapterPipeline, MixOfShowXLAdapterPipeline
from diffusers_mixofshow.pipelines.controlnet import MixOfShowControlNetPipeline, MixOfShowXLControlNetPipeline
from diffusers_mixofshow.pipelines.image_to_image import MixOfShowImg2ImgPipeline, MixOfShowXLImg2ImgPipeline
from diffusers_mixofshow.pipelines.inpainting import MixOfShowInpaintPipeline, MixOfShowXLInpaintPipeline
from diffusers_mixofshow.pipelines.loader import EDLoRALoader
from diffusers_mixofshow.pipelines.refining import refine_regions
from diffusers_mixofshow.pipelines.stable_diffusion import MixOfShowPipeline
from diffusers_mixofshow.pipelines.stable_diffusion_xl import MixOfShowXLPipeline


__all__ = [
    "EDLoRALoader",
    "MixOfShowAdapterPipeline",
    "MixOfShowControlNetPipeline",
    "MixOfShowImg2ImgPipeline",
    "MixOfShowInpaintPipeline",
    "MixOfShowPipeline",
    "MixOfShowXLAdapterPipeline",
    "MixOfShowXLControlNetPipeline",
    "MixOfShowXLImg2ImgPipeline",
    "MixOfShowXLInpaintPipeline",
    "MixOfShowXLPipeline",
    "choose_pipeline",
    "refine_regions",
]


def choose_pipeline(components: Mapping[str, object], task: str = "") -> type[Any]:
    """Choose the pipeline class of this package for a base model.

    Args:
        components: ``pipeline.components`` of any pipeline of the base.
        task: ``Img2Img``, ``Inpaint``, ``ControlNet`` or ``Adapter``; empty for text to image.

    Raises:
        KeyError: If the base's family has no such pipeline.
    """
    name = family_of(components).concept_pipeline.replace("Pipeline", f"{task}Pipeline")
    found: type[Any] = globals()[name]
    return found
