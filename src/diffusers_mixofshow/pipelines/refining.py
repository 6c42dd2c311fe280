"""Draw small subjects again at a higher resolution, each from its region's own prompt."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput
from PIL import Image

from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.families.layers import default_size
from diffusers_mixofshow.families.sdxl import STABLE_DIFFUSION_XL
from diffusers_mixofshow.pictures import read_image
from diffusers_mixofshow.pipelines.loader import EDLoRALoader
from diffusers_mixofshow.pipelines.prompts import (
    NEGATIVE_EMBEDDINGS,
    StableDiffusionPrompts,
    Texts,
    XLPrompts,
    repeat_for_pictures,
)
from diffusers_mixofshow.pipelines.regional import (
    RegionalSampling,
    check_kind,
    warn_of_idle_arguments,
)
from diffusers_mixofshow.pipelines.remarks import Regions, sort_regions
from diffusers_mixofshow.regions import Draft, Isolation, Refinement, Region
from diffusers_mixofshow.regions.weights import coverage


# Image sizes must be multiples of it, as StableDiffusionImg2ImgPipeline demands.
_FACTOR = 8

_ALSO_REFINED = (
    "guidance_scale",
    "clip_skip",
    "cross_attention_kwargs",
    "ip_adapter_image",
    "ip_adapter_image_embeds",
)
"""Arguments of a call that its refinement uses, too."""
_NEGATIVES = ("negative_prompt", "negative_prompt_2")
"""Arguments with the negative prompt of each text encoder."""
_MASKS = "ip_adapter_masks"
"""The entry of `cross_attention_kwargs` with masks of the whole picture."""


class RefinedSampling(RegionalSampling):
    """Mixin for a diffusers pipeline: `__call__` with `refine`, which draws the finished regions again, larger."""

    def __call__(
        self,
        *args: Any,
        regions: Regions | None = None,
        isolation: Isolation | None = None,
        draft: Draft | None = None,
        refine: Refinement | None = None,
        **kwargs: Any,
    ) -> StableDiffusionPipelineOutput | StableDiffusionXLPipelineOutput:
        """See `regional_signature`, which gives each pipeline class its own `__call__`."""
        check_kind("refine", refine, Refinement)
        draw = partial(super().__call__, *args, regions=regions, isolation=isolation, draft=draft, **kwargs)
        if refine is None:
            return draw()
        parent = super(RegionalSampling, self).__call__  # type: ignore[misc]
        signature = inspect.signature(parent)
        arguments = signature.bind_partial(*args, **kwargs).arguments
        arguments.setdefault("guidance_scale", signature.parameters["guidance_scale"].default)
        if arguments.get("output_type", "pil") != "pil":
            raise RegionError(f"`refine` needs pictures, but output_type is {arguments['output_type']!r}.")
        if regions:
            _refuse_other_models(self.unet)
        else:
            warn_of_idle_arguments(refine=refine)
        output = draw()
        found = sort_regions(regions, arguments, self.vae_scale_factor)
        return (
            self._refine_pictures(output, refine, repeat_for_pictures(found, arguments), arguments)
            if found
            else output
        )

    def _refine_pictures(
        self, output: Any, refine: Refinement, regions: Sequence[Sequence[Region]], arguments: Mapping[str, Any]
    ) -> Any:
        """Redraw the regions in the pictures of a call's output."""
        images, texts = output[0], self._list_negatives(arguments)
        negatives: dict[str, Any] = {
            name: [None if text is None else text[number] for text in texts]
            for number, name in enumerate(_NEGATIVES[: len(self._readings)])
        }
        negatives |= self._list_negative_embeddings(arguments)
        refined = refine_regions(
            self,
            images,
            regions,
            strength=refine.strength,
            num_inference_steps=refine.choose_steps(_count_steps(arguments)),
            generator=arguments.get("generator"),
            batch_size=len(images),
            **negatives,
            **{name: arguments[name] for name in _ALSO_REFINED if name in arguments},
        )
        refined = self._protect(images, refined, arguments)
        if isinstance(output, tuple):
            return (refined, *output[1:])
        output.images = refined
        return output

    def _protect(
        self, images: list[Image.Image], refined: list[Image.Image], arguments: Mapping[str, Any]
    ) -> list[Image.Image]:
        """Put back into refined pictures what the call may not change, here nothing."""
        return refined


class _ImageToImage(StableDiffusionPrompts, RegionalSampling, EDLoRALoader, StableDiffusionImg2ImgPipeline):
    """Image to image with concepts, which redraws patches."""

    _expects_names = False  # a patch shows one region, and not every region has a concept


class _XLImageToImage(XLPrompts, RegionalSampling, EDLoRALoader, StableDiffusionXLImg2ImgPipeline):
    """`_ImageToImage` for Stable Diffusion XL."""

    _expects_names = False


@dataclass(frozen=True, eq=False)
class _Patch:
    """The part of a picture that is redrawn for a region, in pixels, and the size at which it is redrawn."""

    picture: int
    region: Region
    box: tuple[int, int, int, int]
    size: tuple[int, int]


def refine_regions(
    pipe: Any,
    images: Sequence[Image.Image],
    regions: Sequence[Region] | Sequence[Sequence[Region]],
    *,
    strength: float = 0.6,
    size: int | None = None,
    margin: float = 0.0,
    feather: float = 0.05,
    batch_size: int = 4,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """Redraw every region at a higher resolution from its own prompt: crop, enlarge, image to image, paste.

    Small faces lose their detail in the VAE (the paper's third limitation, section 6.3).

    Args:
        pipe: A pipeline of this package with the concepts loaded; it is not changed.
        images: Finished pictures; they are not changed.
        regions: The regions of all pictures, or a list of them for each; those of a higher order are pasted last.
        strength: Strength of image to image, from 0 (nothing changes) to 1 (drawn from noise).
        size: A crop is enlarged to an area of size * size pixels; by default the size of the model's own pictures.
            Larger crops are left as they are.
        margin: Context that the model sees around a region, on each side, as a fraction of the region's size.
        feather: Least width of the soft edge of what is pasted, as a fraction of the picture.
        batch_size: How many crops of one size are drawn at once.
        generator: Source of the noise, one for all pictures or one for each.
        settings: Passed to image to image, e.g. `negative_prompt` (for regions that have none of their own; a text,
            or one for each picture; with SDXL also `negative_prompt_2`; or `negative_prompt_embeds`, with a row for
            each picture), `num_inference_steps` and `guidance_scale`. Of IP-Adapter masks of the whole picture, each
            crop gets its part.

    Returns:
        New pictures, the same outside of the regions.

    Raises:
        RegionError: If a list holds something that is no picture or no region; names every defect at once. Or if the
            U-Net needs more than a text to draw.
    """
    _refuse_other_models(pipe.unet)
    nested = any(isinstance(entry, list | tuple) for entry in regions)
    lists: list[Sequence[Any]] = list(regions) if nested else [regions] * len(images)  # type: ignore[arg-type]
    _check_entries(images, lists)
    images = [read_image(image, called=f"picture {number}") for number, image in enumerate(images)]
    size = size or min(default_size(pipe.unet)) * pipe.vae_scale_factor
    found = [
        _find_patch(number, image, region, size, margin)
        for number, (image, own) in enumerate(zip(images, lists, strict=True))
        for region in sorted(own, key=lambda region: region.order)
    ]
    patches = [patch for patch in found if patch is not None]
    call = {**settings, "strength": strength, "generator": generator}
    drawn = _redraw(_make_redrawing_pipeline(pipe), images, patches, batch_size, call)
    results = [image.copy() for image in images]
    for patch in patches:
        _paste(results[patch.picture], patch, drawn[patch], feather)
    return results


def _redraw(
    redraw: Any,
    images: Sequence[Image.Image],
    patches: Sequence[_Patch],
    batch_size: int,
    call: dict[str, Any],
) -> dict[_Patch, Image.Image]:
    """Enlarge and redraw every patch, in batches of one size, guidance and mask, with negatives of one kind."""
    drawn: dict[_Patch, Image.Image] = {}
    names = _NEGATIVES[: len(redraw._readings)]
    shared, generators = [call.pop(name, None) for name in names], call.pop("generator", None)
    embeddings = {name: rows for name in NEGATIVE_EMBEDDINGS if (rows := call.pop(name, None)) is not None}
    negatives = {patch: _choose_negative(patch, shared, embeddings, redraw._takes_zeros) for patch in patches}
    masked = (call.get("cross_attention_kwargs") or {}).get(_MASKS) is not None
    places = {patch: (patch.box, images[patch.picture].size) if masked else None for patch in patches}
    kinds = {
        patch: (patch.size, type(negatives[patch]), patch.region.guidance_scale, places[patch]) for patch in patches
    }
    for kind in dict.fromkeys(kinds.values()):
        alike = [patch for patch in patches if kinds[patch] == kind]
        size, _, guidance, place = kind
        settings = call if guidance is None else {**call, "guidance_scale": guidance}
        settings = settings if place is None else _cut_masks(settings, *place, size)
        for start in range(0, len(alike), batch_size):
            batch = alike[start : start + batch_size]
            pictures = redraw(
                [patch.region.prompt for patch in batch],
                image=[_cut(images[patch.picture], patch.box).resize(size) for patch in batch],
                **_join_negatives(names, [negatives[patch] for patch in batch]),
                generator=[generators[patch.picture] for patch in batch]
                if isinstance(generators, Sequence)
                else generators,
                **settings,
            ).images
            drawn |= dict(zip(batch, pictures, strict=True))
    return drawn


def _count_steps(arguments: Mapping[str, Any]) -> int:
    """The steps of a call from noise: of its own timesteps or sigmas, where it has some."""
    own = [given for name in ("timesteps", "sigmas") if (given := arguments.get(name)) is not None]
    return len(own[0]) if own else arguments.get("num_inference_steps", 50)


def _refuse_other_models(unet: Any) -> None:
    if unet.config.in_channels != unet.config.out_channels:
        raise RegionError(
            f"Refining needs a U-Net whose input is a latent alone, of {unet.config.out_channels} channels; this one "
            f"takes {unet.config.in_channels}, as those for inpainting do. Leave `refine` out, or take another base."
        )


def _check_entries(images: Sequence[object], regions: Sequence[Sequence[object]]) -> None:
    defects = [f"a {type(image).__name__} is no picture" for image in images if not isinstance(image, Image.Image)]
    others = {type(region).__name__ for own in regions for region in own if not isinstance(region, Region)}
    defects += [f"a {other} is no Region" for other in sorted(others)]
    if len(regions) != len(images):
        defects.append(
            f"{len(regions)} lists of regions for {len(images)} pictures; give one for each, or one for all"
        )
    if defects:
        raise RegionError("refine_regions: " + "; ".join(defects) + ".")


def _choose_negative(
    patch: _Patch,
    shared: Sequence[str | Sequence[str | None] | None],
    embeddings: Mapping[str, Sequence[torch.Tensor]],
    takes_zeros: bool,
) -> Texts | dict[str, torch.Tensor]:
    """Choose what each text encoder reads as a patch's negative prompt; None for zeros instead of an encoded text.

    Args:
        patch: The patch; a negative prompt of its region's own is read by all text encoders.
        shared: For each text encoder the negative prompt of all pictures, or one for each.
        embeddings: Embeddings in place of these, one for each picture; may be empty.
        takes_zeros: Whether the pipeline takes zeros where there is no negative prompt.
    """
    own = patch.region.negative_prompt
    if own is None and embeddings:
        return {name: rows[patch.picture] for name, rows in embeddings.items()}
    given = [each if each is None or isinstance(each, str) else each[patch.picture] for each in shared]
    texts = given if own is None else [own] * len(shared)
    if texts[0] is None and takes_zeros:
        return None
    first = texts[0] or ""
    return tuple(first if text is None else text for text in texts)


def _join_negatives(names: Sequence[str], own: Sequence[Any]) -> dict[str, Any]:
    """Join the negatives of a batch, which are of one kind, to the arguments of a call."""
    if isinstance(own[0], dict):
        return {name: torch.stack([each[name] for each in own]) for name in own[0]}
    return {name: own[0] and [each[number] for each in own] for number, name in enumerate(names)}


def _cut_masks(
    call: Mapping[str, Any], box: tuple[int, int, int, int], whole: tuple[int, int], size: tuple[int, int]
) -> dict[str, Any]:
    """The arguments of a call with the part of its IP-Adapter masks that a patch shows, at the patch's size.

    Args:
        call: The arguments; each mask is a tensor (..., height, width) of any size.
        box: The patch in pixels, see `_cut`.
        whole: Width and height of the picture.
        size: Width and height at which the patch is redrawn.
    """
    left, top, right, bottom = box

    def find(start: int, end: int, count: int, side: int, cells: int) -> torch.Tensor:
        places = start + (torch.arange(count) + 0.5) * (end - start) / count
        return (places * cells / side).floor().long().clamp(0, cells - 1)

    def cut(mask: torch.Tensor | None) -> torch.Tensor | None:
        if mask is None:
            return None
        rows = find(top, bottom, size[1], whole[1], mask.shape[-2])
        columns = find(left, right, size[0], whole[0], mask.shape[-1])
        return mask[..., rows[:, None], columns]

    given = call["cross_attention_kwargs"]
    masks = [cut(mask) for mask in given[_MASKS]] if isinstance(given[_MASKS], list) else cut(given[_MASKS])
    return {**call, "cross_attention_kwargs": {**given, _MASKS: masks}}


def _find_patch(number: int, image: Image.Image, region: Region, size: int, margin: float) -> _Patch | None:
    """The patch around a region with its margin; None if it is as large as it would be redrawn.

    Models draw square and wide pictures better than narrow ones, so no patch is narrower than high. The region is in
    the middle of its patch, which may reach beyond the picture.
    """
    rows, columns = (coverage(region, image.height, image.width) > 0).nonzero(as_tuple=True)
    if not len(rows):
        return None
    height = round((1 + 2 * margin) * (int(rows.max()) + 1 - int(rows.min())))
    width = max(height, round((1 + 2 * margin) * (int(columns.max()) + 1 - int(columns.min()))))
    top, left = (
        (int(along.min()) + int(along.max()) + 1 - side) // 2 for along, side in ((rows, height), (columns, width))
    )
    right, bottom = left + width, top + height
    scale = size / math.sqrt((right - left) * (bottom - top))
    if scale <= 1:
        return None
    width, height = (max(_FACTOR, round(side * scale / _FACTOR) * _FACTOR) for side in (right - left, bottom - top))
    return _Patch(number, region, (left, top, right, bottom), (width, height))


def _cut(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Cut a box out of a picture; beyond the picture's edges its outermost pixels are repeated."""
    left, top, right, bottom = box
    rows = np.arange(top, bottom).clip(0, image.height - 1)
    columns = np.arange(left, right).clip(0, image.width - 1)
    return Image.fromarray(np.asarray(image)[rows[:, None], columns])


def _paste(picture: Image.Image, patch: _Patch, drawn: Image.Image, feather: float) -> None:
    """Paste a redrawn patch into the picture, where its region is, with a soft edge."""
    left, top, right, bottom = patch.box
    soft = dataclasses.replace(patch.region, feather=max(feather, patch.region.feather), rounding="nearest")
    share = coverage(soft, picture.height, picture.width).numpy()
    layer = picture.copy()
    layer.paste(drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
    picture.paste(layer, mask=Image.fromarray((share * 255).round().astype(np.uint8)))


def _make_redrawing_pipeline(pipe: Any) -> Any:
    """Make an image-to-image pipeline of the same components and concepts."""
    components = pipe.components
    kind = _XLImageToImage if family_of(components) is STABLE_DIFFUSION_XL else _ImageToImage
    own = {"requires_safety_checker": False, "add_watermarker": getattr(pipe, "watermark", None) is not None}
    given = {**pipe.config, **components, **own}
    redraw = kind(**{name: given[name] for name in inspect.signature(kind.__init__).parameters if name in given})
    redraw._edloras = pipe._edloras
    redraw.set_progress_bar_config(**{**getattr(pipe, "_progress_bar_config", {}), "desc": "Refining"})
    return redraw
