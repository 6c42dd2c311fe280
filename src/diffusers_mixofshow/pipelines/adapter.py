"""Text to image under the guidance of T2I-Adapters.

diffusers' own pipeline for them knows neither `callback_on_step_end` nor LoRA and textual-inversion loading. This
one is `StableDiffusionPipeline`, and the adapters' features reach the U-Net beside its arguments.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from diffusers_mixofshow.pipelines.prompts import StableDiffusionPrompts, XLPrompts, prompt_count
from diffusers_mixofshow.pipelines.refining import RefinedSampling
from diffusers_mixofshow.pipelines.regional import regional_signature


# Sizes that StableDiffusionPipeline takes.
_PARENTS_FACTOR = 8

_ADAPTER_DOC = """
    image (picture, array, tensor, or a list of them):
        The condition image, one for all prompts, or a list with one for each prompt. With several adapters a
        list with one entry for each adapter, each of these as before. Height and width of the result are by default
        its own, rounded down to what the models can do.
    adapter_conditioning_scale (`float` or `list[float]`, *optional*, defaults to 1.0):
        Strength of the adapters, one for all or one for each.
    adapter_conditioning_factor (`float`, *optional*, defaults to 1.0):
        Part of the steps, from the first on, in which the adapters act."""


class AdapterSampling(RefinedSampling):
    """Mixin for a diffusers pipeline of text to image: `adapter` among its components acts in its calls."""

    adapter: T2IAdapter | MultiAdapter
    _execution_device: torch.device
    register_modules: Callable[..., None]

    def _register_adapter(self, adapter: T2IAdapter | MultiAdapter | Sequence[T2IAdapter]) -> None:
        if isinstance(adapter, list | tuple):
            adapter = MultiAdapter(adapter) if len(adapter) > 1 else adapter[0]
        self.register_modules(adapter=adapter)

    @contextmanager
    def _adapters_acting(
        self, image: Any, scale: float | Sequence[float], factor: float, arguments: Mapping[str, Any]
    ) -> Iterator[dict[str, int]]:
        """Let the call inside the block follow the condition images.

        Args:
            image: See `_ADAPTER_DOC`, as the two next.
            scale: Strength of the adapters.
            factor: Part of the steps.
            arguments: The call's others, by name.

        Yields:
            Height and width of the call.
        """
        pixels = self._condition_pixels(image, arguments.get("height"), arguments.get("width"))
        strengths = _strengths(scale, len(pixels))
        _check_part(factor)
        if 0 in strengths:
            warn("An adapter with a strength of 0 has no effect.")
        features = [_for_each_picture(each, arguments) for each in self._adapter_features(pixels, strengths)]
        with self._next_call_hooked(_adding(features, lambda: int(self.num_timesteps * factor))):
            yield dict(zip(("height", "width"), pixels[0].shape[-2:], strict=True))

    @property
    def _adapters(self) -> list[T2IAdapter]:
        return list(self.adapter.adapters) if isinstance(self.adapter, MultiAdapter) else [self.adapter]

    def _condition_pixels(self, image: Any, height: int | None, width: int | None) -> list[torch.Tensor]:
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
        pixels: list[torch.Tensor] = []
        for adapter, given in zip(self._adapters, images, strict=True):
            gray = adapter.config.in_channels == 1
            processor = VaeImageProcessor(
                vae_scale_factor=factor, do_normalize=False, do_convert_grayscale=gray, do_convert_rgb=not gray
            )
            pixels.append(processor.preprocess(given, height=height, width=width))
            height, width = pixels[0].shape[-2:]
        return pixels

    def _adapter_features(self, pixels: Sequence[torch.Tensor], strengths: Sequence[float]) -> list[torch.Tensor]:
        """Sum of the adapters' features times their strengths, for each scale (images, channels, height, width)."""
        total: list[torch.Tensor] = []
        for adapter, image, strength in zip(self._adapters, pixels, strengths, strict=True):
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
        signature = inspect.signature(StableDiffusionPipeline.__call__)
        arguments = signature.bind_partial(self, prompt, height, width, *args, **kwargs).arguments
        with self._adapters_acting(image, adapter_conditioning_scale, adapter_conditioning_factor, arguments) as size:
            return super().__call__(prompt, size["height"], size["width"], *args, **kwargs)


@regional_signature(StableDiffusionXLPipeline, _ADAPTER_DOC)
class MixOfShowXLAdapterPipeline(XLPrompts, AdapterSampling, EDLoRALoader, StableDiffusionXLPipeline):
    """The same for Stable Diffusion XL.

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
        signature = inspect.signature(StableDiffusionXLPipeline.__call__)
        arguments = signature.bind_partial(self, prompt, prompt_2, height, width, *args, **kwargs).arguments
        with self._adapters_acting(image, adapter_conditioning_scale, adapter_conditioning_factor, arguments) as size:
            return super().__call__(prompt, prompt_2, size["height"], size["width"], *args, **kwargs)


def _strengths(scale: float | Sequence[float], count: int) -> list[float]:
    strengths = [scale] * count if isinstance(scale, int | float) else list(scale)
    if len(strengths) != count:
        raise ConfigurationError(
            f"`adapter_conditioning_scale` has {len(strengths)} values for {count} adapters; give one, or as many."
        )
    return strengths


def _for_each_picture(feature: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Repeat what belongs to a prompt for each of its pictures; what belongs to all prompts stays one."""
    if len(feature) == 1:
        return feature
    prompts = prompt_count(arguments.get("prompt"), arguments.get("prompt_embeds"))
    if len(feature) != prompts:
        raise ConfigurationError(
            f"Got {len(feature)} condition images for {prompts} prompts; give one for each, or one for all."
        )
    return feature.repeat_interleave(arguments.get("num_images_per_prompt", 1), dim=0)


def _check_part(factor: object) -> None:
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 <= factor <= 1:
        raise ConfigurationError(f"`adapter_conditioning_factor` is {factor!r}; expected a number from 0 to 1.")


def _adding(features: Sequence[torch.Tensor], passes: Callable[[], int]) -> PassHook:
    """Hand the adapters' features to the U-Net in so many passes, the first ones, once for each half of guidance."""
    done = itertools.count()

    def add(inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if next(done) >= passes():
            return inputs, named
        rows = len(inputs[0] if inputs else named["sample"])
        # A new list each time, as the U-Net takes its entries out.
        states = [feature.repeat(rows // len(feature), 1, 1, 1) for feature in features]
        return inputs, {**named, "down_intrablock_additional_residuals": states}

    return add
