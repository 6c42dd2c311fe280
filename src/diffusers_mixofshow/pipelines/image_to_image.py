"""Image to image with concepts and regions."""

from __future__ import annotations

from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

from diffusers_mixofshow.pipelines.loader import EDLoRALoader
from diffusers_mixofshow.pipelines.prompts import StableDiffusionPrompts, XLPrompts
from diffusers_mixofshow.pipelines.refining import RefinedSampling
from diffusers_mixofshow.pipelines.regional import regional_signature


@regional_signature(StableDiffusionImg2ImgPipeline)
class MixOfShowImg2ImgPipeline(StableDiffusionPrompts, RefinedSampling, EDLoRALoader, StableDiffusionImg2ImgPipeline):
    """Image to image: an existing picture is drawn again, with concepts and regions.

    Example:
        >>> pipe = MixOfShowImg2ImgPipeline.from_pipe(pipe)
        >>> pipe("two people", image=photo, strength=0.6, regions=[...]).images[0]
    """

    _begins_with_noise = False


@regional_signature(StableDiffusionXLImg2ImgPipeline)
class MixOfShowXLImg2ImgPipeline(XLPrompts, RefinedSampling, EDLoRALoader, StableDiffusionXLImg2ImgPipeline):
    """`MixOfShowImg2ImgPipeline` for Stable Diffusion XL.

    Example:
        >>> pipe = MixOfShowXLImg2ImgPipeline.from_pipe(pipe)
        >>> pipe("two people", image=photo, strength=0.6, regions=[...]).images[0]
    """

    _begins_with_noise = False
