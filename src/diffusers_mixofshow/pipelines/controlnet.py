"""Text to image under the guidance of ControlNets."""

from __future__ import annotations

from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline

from diffusers_mixofshow.pipelines.loader import EDLoRALoader
from diffusers_mixofshow.pipelines.prompts import StableDiffusionPrompts, XLPrompts
from diffusers_mixofshow.pipelines.refining import RefinedSampling
from diffusers_mixofshow.pipelines.regional import regional_signature


@regional_signature(StableDiffusionControlNetPipeline)
class MixOfShowControlNetPipeline(
    StableDiffusionPrompts, RefinedSampling, EDLoRALoader, StableDiffusionControlNetPipeline
):
    """Concepts and regions with one ControlNet, or several as a list (arXiv:2302.05543).

    A ControlNet sees the prompt as the U-Net does: layer by layer and region by region.

    Example:
        >>> pipe = MixOfShowControlNetPipeline.from_pipe(pipe, controlnet=[openpose, depth])
        >>> pipe("two people", image=[pose, depth_map], regions=[...]).images[0]
    """


@regional_signature(StableDiffusionXLControlNetPipeline)
class MixOfShowXLControlNetPipeline(XLPrompts, RefinedSampling, EDLoRALoader, StableDiffusionXLControlNetPipeline):
    """`MixOfShowControlNetPipeline` for Stable Diffusion XL.

    Example:
        >>> pipe = MixOfShowXLControlNetPipeline.from_pipe(pipe, controlnet=[openpose, depth])
        >>> pipe("two people", image=[pose, depth_map], regions=[...]).images[0]
    """
