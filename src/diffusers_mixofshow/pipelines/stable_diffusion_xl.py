"""Text to image with Stable Diffusion XL."""

from __future__ import annotations

from diffusers import StableDiffusionXLPipeline

from diffusers_mixofshow.pipelines.loader import EDLoRALoader
from diffusers_mixofshow.pipelines.prompts import XLPrompts
from diffusers_mixofshow.pipelines.refining import RefinedSampling
from diffusers_mixofshow.pipelines.regional import regional_signature


@regional_signature(StableDiffusionXLPipeline)
class MixOfShowXLPipeline(XLPrompts, RefinedSampling, EDLoRALoader, StableDiffusionXLPipeline):
    """Stable Diffusion XL with customised concepts, alone and several together in regions (arXiv:2305.18292).

    Without a concept in the prompt and without regions it is `StableDiffusionXLPipeline` bit for bit. The U-Net also
    reads one vector of the whole text, which has no place in the picture: it is the global prompt's.

    Example:
        >>> pipe = MixOfShowXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
        >>> left = Region("a knight in armour, near the castle", box=(0, 0.2, 0.5, 1))
        >>> right = Region("a witch, near the castle", box=(0.5, 0.2, 1, 1))
        >>> pipe("two people near the castle", regions=[left, right], draft=Draft(), refine=Refinement()).images[0]
    """
