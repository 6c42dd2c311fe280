"""Pipelines that know concepts and regions: diffusers' own, with the mixins of this folder."""

from diffusers_mixofshow.pipelines.adapter import MixOfShowAdapterPipeline
from diffusers_mixofshow.pipelines.controlnet import MixOfShowControlNetPipeline
from diffusers_mixofshow.pipelines.image_to_image import MixOfShowImg2ImgPipeline
from diffusers_mixofshow.pipelines.inpainting import MixOfShowInpaintPipeline
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
    "MixOfShowXLPipeline",
    "refine_regions",
]
