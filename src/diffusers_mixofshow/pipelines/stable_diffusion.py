"""Text to image with Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline

from diffusers_mixofshow.pipelines.loader import EDLoRALoader
from diffusers_mixofshow.pipelines.prompts import StableDiffusionPrompts
from diffusers_mixofshow.pipelines.refining import RefinedSampling
from diffusers_mixofshow.pipelines.regional import regional_signature


@regional_signature(StableDiffusionPipeline)
class MixOfShowPipeline(StableDiffusionPrompts, RefinedSampling, EDLoRALoader, StableDiffusionPipeline):
    """Stable Diffusion with customised concepts, alone and several together in regions (arXiv:2305.18292).

    Without a concept in the prompt and without regions it is `StableDiffusionPipeline` bit for bit.

    Example:
        >>> pipe = MixOfShowPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> pipe.load_edlora("user/edlora-potter")
        >>> pipe("a <potter> in front of the Eiffel tower").images[0]

        >>> pipe.load_edlora("user/edlora-hermione")
        >>> left = Region("a <potter> in uniform, near the castle", box=(0, 0.2, 0.5, 1))
        >>> right = Region("a <hermione>, near the castle", box=(0.5, 0.2, 1, 1))
        >>> pipe("two people near the castle", regions=[left, right], draft=Draft(), refine=Refinement()).images[0]
    """
