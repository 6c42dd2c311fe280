"""Inpainting."""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionInpaintPipeline

from diffusers_mixofshow.pipelines.loader import EDLoRALoader
from diffusers_mixofshow.pipelines.regional import RegionalSampling, regional_signature


class MixOfShowInpaintPipeline(RegionalSampling, EDLoRALoader, StableDiffusionInpaintPipeline):
    """Concepts and regions in the masked part of a picture, with any U-Net or one made for inpainting.

    Example:
        >>> pipe = MixOfShowInpaintPipeline.from_pipe(pipe)
        >>> pipe("two people", image=photo, mask_image=white_where_new, regions=[...]).images[0]
    """

    @regional_signature(StableDiffusionInpaintPipeline)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replaced by the parent's, see `regional_signature`."""
        return super().__call__(*args, **kwargs)
