"""Text to image under the guidance of T2I-Adapters.

diffusers' own pipelines for T2I-Adapters have neither `callback_on_step_end` nor the loading of LoRAs and textual
inversions. These here are the text-to-image pipelines, and a hook hands the adapters' features to the U-Net.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    MultiAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from diffusers_mixofshow.conditioning.passes import PassHook
from diffusers_mixofshow.errors import ConfigurationError, warn
from diffusers_mixofshow.pipelines.loader import EDLoRALoader
from diffusers_mixofshow.pipelines.prompts import StableDiffusionPrompts, XLPrompts, count_prompts
from diffusers_mixofshow.pipelines.refining import RefinedSampling
from diffusers_mixofshow.pipelines.regional import RegionalSampling, regional_signature


# StableDiffusionPipeline refuses heights and widths that this does not divide.
_PARENTS_FACTOR = 8

_ADAPTER_DOC = """
    image (picture, array, tensor, or a list of them):
        The condition image: one for all prompts, or a list with one for each prompt. With several adapters, a list
        with one such entry for each adapter. Without `height` and `width` the result has the size of the condition
        image, rounded down to a size that the models can draw.
    adapter_conditioning_scale (`float` or `list[float]`, *optional*, defaults to 1.0):
        Strength of the adapters, one for all or one for each.
    adapter_conditioning_factor (`float`, *optional*, defaults to 1.0):
        Fraction of the steps, counted from the first, in which the adapters act."""


class AdapterSampling(RefinedSampling):
    """Mixin for a text-to-image pipeline of diffusers: its component `adapter` guides every call."""

    adapter: T2IAdapter | MultiAdapter
    _execution_device: torch.device
    register_modules: Callable[..., None]

    def _register_adapter(self, adapter: T2IAdapter | MultiAdapter | Sequence[T2IAdapter]) -> None:
        if isinstance(adapter, list | tuple):
            adapter = MultiAdapter(adapter) if len(adapter) > 1 else adapter[0]
        self.register_modules(adapter=adapter)

    def _call_with_adapters(
        self, image: Any, scale: float | Sequence[float], factor: float, /, *args: Any, **kwargs: Any
    ) -> Any:
        """Call the diffusers pipeline with its own arguments, guided by the first three (see `_ADAPTER_DOC`)."""
        parent = super(RegionalSampling, self).__call__  # type: ignore[misc]
        given = inspect.signature(parent).bind_partial(*args, **kwargs)
        arguments = given.arguments
        images = self._read_condition_images(image, arguments.get("height"), arguments.get("width"))
        strengths = _repeat_scale(scale, len(images))
        _check_factor(factor)
        if 0 in strengths:
            warn("An adapter with a strength of 0 has no effect.")
        features = [_repeat_for_pictures(each, arguments) for each in self._compute_features(images, strengths)]
        arguments["height"], arguments["width"] = images[0].shape[-2:]
        with self._hook_next_call(_make_hook(features, lambda: int(self.num_timesteps * factor))):
            return super().__call__(*given.args, **given.kwargs)

    @property
    def _adapters(self) -> list[T2IAdapter]:
        return list(self.adapter.adapters) if isinstance(self.adapter, MultiAdapter) else [self.adapter]

    def _read_condition_images(self, image: Any, height: int | None, width: int | None) -> list[torch.Tensor]:
        """Each adapter's condition images in [0, 1], shape (images, channels, height, width), all of one size."""
        count = len(self._adapters)
        images = image if count > 1 else [image]
        if image is None or not isinstance(images, list | tuple) or len(images) != count:
            got = f"{len(images)} entries" if isinstance(images, list | tuple) and image is not None else type(image)
            raise ConfigurationError(
                f"`image` has {got}; expected {'a list of ' if count > 1 else ''}{count} condition"
                f" {'images, one for each adapter' if count > 1 else 'image'}."
            )
        factor = math.lcm(_PARENTS_FACTOR, self.vae_scale_factor, self.adapter.downscale_factor)
        read: list[torch.Tensor] = []
        for adapter, given in zip(self._adapters, images, strict=True):
            gray = adapter.config.in_channels == 1
            processor = VaeImageProcessor(
                vae_scale_factor=factor, do_normalize=False, do_convert_grayscale=gray, do_convert_rgb=not gray
            )
            read.append(processor.preprocess(given, height=height, width=width))
            height, width = read[0].shape[-2:]
        return read

    def _compute_features(self, images: Sequence[torch.Tensor], strengths: Sequence[float]) -> list[torch.Tensor]:
        """Sum the adapters' features times their strengths: one (images, channels, height, width) for each scale."""
        total: list[torch.Tensor] = []
        for adapter, image, strength in zip(self._adapters, images, strengths, strict=True):
            features = adapter(image.to(device=self._execution_device, dtype=adapter.dtype))
            scaled = [strength * feature for feature in features]
            total = [one + other for one, other in zip(total, scaled, strict=True)] if total else scaled
        return total


@regional_signature(StableDiffusionPipeline, _ADAPTER_DOC)
class MixOfShowAdapterPipeline(StableDiffusionPrompts, AdapterSampling, EDLoRALoader, StableDiffusionPipeline):
    """Concepts and regions with one T2I-Adapter, or several as a list (arXiv:2302.08453).

    Args:
        adapter: One adapter or several; the other components are those of `StableDiffusionPipeline`.

    Example:
        >>> pipe = MixOfShowAdapterPipeline.from_pipe(pipe, adapter=[pose_adapter, sketch_adapter])
        >>> pipe("two people", image=[pose, sketch], adapter_conditioning_scale=[1.0, 0.6], regions=[...]).images[0]
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->adapter->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        adapter: T2IAdapter | MultiAdapter | list[T2IAdapter],
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: Any,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self._register_adapter(adapter)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        *args: Any,
        adapter_conditioning_scale: float | Sequence[float] = 1.0,
        adapter_conditioning_factor: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        """Replaced by the parent's, see `regional_signature`."""
        scale, factor = adapter_conditioning_scale, adapter_conditioning_factor
        return self._call_with_adapters(image, scale, factor, prompt, height, width, *args, **kwargs)


@regional_signature(StableDiffusionXLPipeline, _ADAPTER_DOC)
class MixOfShowXLAdapterPipeline(XLPrompts, AdapterSampling, EDLoRALoader, StableDiffusionXLPipeline):
    """`MixOfShowAdapterPipeline` for Stable Diffusion XL.

    Args:
        adapter: One adapter or several; the other components are those of `StableDiffusionXLPipeline`.

    Example:
        >>> pipe = MixOfShowXLAdapterPipeline.from_pipe(pipe, adapter=pose_adapter)
        >>> pipe("two people", image=pose, regions=[...]).images[0]
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->adapter->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        adapter: T2IAdapter | MultiAdapter | list[T2IAdapter],
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self._register_adapter(adapter)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        *args: Any,
        adapter_conditioning_scale: float | Sequence[float] = 1.0,
        adapter_conditioning_factor: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        """Replaced by the parent's, see `regional_signature`."""
        scale, factor = adapter_conditioning_scale, adapter_conditioning_factor
        return self._call_with_adapters(image, scale, factor, prompt, prompt_2, height, width, *args, **kwargs)


def _repeat_scale(scale: float | Sequence[float], count: int) -> list[float]:
    strengths = [scale] * count if isinstance(scale, int | float) else list(scale)
    if len(strengths) != count:
        raise ConfigurationError(
            f"`adapter_conditioning_scale` has {len(strengths)} values for {count} adapters; give one, or as many."
        )
    return strengths


def _repeat_for_pictures(feature: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Repeat each prompt's features for each of its pictures; features of all prompts stay a single row."""
    if len(feature) == 1:
        return feature
    prompts = count_prompts(arguments.get("prompt"), arguments.get("prompt_embeds"))
    if len(feature) != prompts:
        raise ConfigurationError(
            f"Got {len(feature)} condition images for {prompts} prompts; give one for each, or one for all."
        )
    return feature.repeat_interleave(arguments.get("num_images_per_prompt", 1), dim=0)


def _check_factor(factor: object) -> None:
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 <= factor <= 1:
        raise ConfigurationError(f"`adapter_conditioning_factor` is {factor!r}; expected a number from 0 to 1.")


def _make_hook(features: Sequence[torch.Tensor], passes: Callable[[], int]) -> PassHook:
    """Make a hook that hands the features to the U-Net in its first passes, to both halves of guidance."""
    done = itertools.count()

    def add(inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if next(done) >= passes():
            return inputs, named
        rows = len(inputs[0] if inputs else named["sample"])
        # A new list each time: the U-Net's forward pops its entries.
        states = [feature.repeat(rows // len(feature), 1, 1, 1) for feature in features]
        return inputs, {**named, "down_intrablock_additional_residuals": states}

    return add
