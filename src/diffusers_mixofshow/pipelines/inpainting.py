"""Inpainting with concepts and regions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image

from diffusers_mixofshow.families.layers import default_size
from diffusers_mixofshow.pipelines.loader import EDLoRALoader
from diffusers_mixofshow.pipelines.prompts import StableDiffusionPrompts, XLPrompts
from diffusers_mixofshow.pipelines.refining import RefinedSampling
from diffusers_mixofshow.pipelines.regional import regional_signature
from diffusers_mixofshow.pipelines.remarks import remark_on_cropped_regions
from diffusers_mixofshow.regions import Region
from diffusers_mixofshow.regions.cropping import Crop


class InpaintedSampling(RefinedSampling):
    """Mixin for an inpainting pipeline: regions are given on the whole picture, also where only a crop is drawn."""

    _begins_with_noise = False
    mask_processor: Any

    def _move_regions(
        self, regions: tuple[tuple[Region, ...], ...], arguments: Mapping[str, Any]
    ) -> tuple[tuple[tuple[Region, ...], ...], list[str]]:
        """With `padding_mask_crop` the U-Net sees an enlarged crop of the picture: move the regions onto it."""
        crop = self._find_crop(arguments)
        if crop is None:
            return regions, []
        moved = {region: crop.move(region) for own in regions for region in own}
        seen = tuple(tuple(found for region in own if (found := moved[region]) is not None) for own in regions)
        missing = [region for region, found in moved.items() if found is None]
        return seen if any(seen) else (), remark_on_cropped_regions(missing)

    def _protect(
        self, images: list[Image.Image], refined: list[Image.Image], arguments: Mapping[str, Any]
    ) -> list[Image.Image]:
        """Keep the call's own pictures where the mask is black."""
        width, height = images[0].size
        masks = self.mask_processor.preprocess(arguments["mask_image"], height=height, width=width)
        drawn = [Image.fromarray((mask[0] * 255).byte().cpu().numpy()) for mask in masks]
        return [
            Image.composite(new, old, drawn[number % len(drawn)])
            for number, (old, new) in enumerate(zip(images, refined, strict=True))
        ]

    def _find_crop(self, arguments: Mapping[str, Any]) -> Crop | None:
        """The crop that diffusers will enlarge; None without `padding_mask_crop`, or where diffusers raises."""
        picture, mask, padding = (arguments.get(name) for name in ("image", "mask_image", "padding_mask_crop"))
        if padding is None or not (isinstance(picture, Image.Image) and isinstance(mask, Image.Image)):
            return None
        own_height, own_width = (side * self.vae_scale_factor for side in default_size(self._denoisers()[0]))
        width, height = arguments.get("width") or own_width, arguments.get("height") or own_height
        box = self.mask_processor.get_crop_region(mask, width, height, pad=padding)
        if box[0] >= box[2] or box[1] >= box[3]:
            return None
        return Crop(box=box, picture=picture.size, canvas=(width, height))


@regional_signature(StableDiffusionInpaintPipeline)
class MixOfShowInpaintPipeline(
    StableDiffusionPrompts, InpaintedSampling, EDLoRALoader, StableDiffusionInpaintPipeline
):
    """Concepts and regions in the masked part of a picture, with a U-Net for text to image or for inpainting.

    Regions are given on the whole picture, also where `padding_mask_crop` draws only the neighbourhood of the mask.

    Example:
        >>> pipe = MixOfShowInpaintPipeline.from_pipe(pipe)
        >>> pipe("two people", image=photo, mask_image=white_where_new, regions=[...]).images[0]
    """


@regional_signature(StableDiffusionXLInpaintPipeline)
class MixOfShowXLInpaintPipeline(XLPrompts, InpaintedSampling, EDLoRALoader, StableDiffusionXLInpaintPipeline):
    """`MixOfShowInpaintPipeline` for Stable Diffusion XL.

    Example:
        >>> pipe = MixOfShowXLInpaintPipeline.from_pipe(pipe)
        >>> pipe("two people", image=photo, mask_image=white_where_new, regions=[...]).images[0]
    """
