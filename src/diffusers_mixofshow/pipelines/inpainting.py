"""Inpainting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image

from diffusers_mixofshow.families.layers import own_size
from diffusers_mixofshow.pipelines.loader import EDLoRALoader
from diffusers_mixofshow.pipelines.prompts import StableDiffusionPrompts, XLPrompts
from diffusers_mixofshow.pipelines.refining import RefinedSampling
from diffusers_mixofshow.pipelines.regional import regional_signature
from diffusers_mixofshow.pipelines.remarks import missing_remarks
from diffusers_mixofshow.regions import Region
from diffusers_mixofshow.regions.cropping import Crop


class InpaintedSampling(RefinedSampling):
    """Mixin for a diffusers pipeline that inpaints: regions are parts of the picture, also where a crop is drawn."""

    _begins_with_noise = False
    mask_processor: Any

    def _regions_seen(
        self, regions: tuple[tuple[Region, ...], ...], arguments: Mapping[str, Any]
    ) -> tuple[tuple[tuple[Region, ...], ...], list[str]]:
        """With `padding_mask_crop` the U-Net sees an enlarged part of the picture: the regions move onto it."""
        crop = self._crop(arguments)
        if crop is None:
            return regions, []
        moved = {region: crop.move(region) for own in regions for region in own}
        seen = tuple(tuple(found for region in own if (found := moved[region]) is not None) for own in regions)
        missing = [region for region, found in moved.items() if found is None]
        return seen if any(seen) else (), missing_remarks(missing)

    def _crop(self, arguments: Mapping[str, Any]) -> Crop | None:
        """The part of the picture that diffusers will enlarge; None without one, or where it will complain."""
        picture, mask, padding = (arguments.get(name) for name in ("image", "mask_image", "padding_mask_crop"))
        if padding is None or not (isinstance(picture, Image.Image) and isinstance(mask, Image.Image)):
            return None
        own_height, own_width = (side * self.vae_scale_factor for side in own_size(self._denoisers()[0]))
        width, height = arguments.get("width") or own_width, arguments.get("height") or own_height
        box = self.mask_processor.get_crop_region(mask, width, height, pad=padding)
        if box[0] >= box[2] or box[1] >= box[3]:
            return None
        return Crop(box=box, picture=picture.size, canvas=(width, height))


@regional_signature(StableDiffusionInpaintPipeline)
class MixOfShowInpaintPipeline(
    StableDiffusionPrompts, InpaintedSampling, EDLoRALoader, StableDiffusionInpaintPipeline
):
    """Concepts and regions in the masked part of a picture, with any U-Net or one made for inpainting.

    Regions are parts of the picture also where `padding_mask_crop` draws the neighbourhood of the mask alone.

    Example:
        >>> pipe = MixOfShowInpaintPipeline.from_pipe(pipe)
        >>> pipe("two people", image=photo, mask_image=white_where_new, regions=[...]).images[0]
    """


@regional_signature(StableDiffusionXLInpaintPipeline)
class MixOfShowXLInpaintPipeline(XLPrompts, InpaintedSampling, EDLoRALoader, StableDiffusionXLInpaintPipeline):
    """The same for Stable Diffusion XL.

    Example:
        >>> pipe = MixOfShowXLInpaintPipeline.from_pipe(pipe)
        >>> pipe("two people", image=photo, mask_image=white_where_new, regions=[...]).images[0]
    """
