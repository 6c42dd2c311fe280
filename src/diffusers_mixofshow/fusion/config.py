"""All settings of gradient fusion."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypedDict

import torch

from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.fusion.collection import FusablePipeline, Recording, TextTokens
from diffusers_mixofshow.fusion.gram import Device
from diffusers_mixofshow.fusion.prompts import PromptSet
from diffusers_mixofshow.fusion.published import MaxBytes, refuse_other_sizes
from diffusers_mixofshow.fusion.solving import Ridge, Settings, check_device


class FusionKeywords(TypedDict, total=False):
    """The fields of `FusionConfig`, as keywords."""

    prompts: PromptSet | None
    steps: int
    guidance_scale: float | None
    negative_prompt: str | None
    seeds: Sequence[int]
    ridge: Ridge | None
    prior: float
    prior_prompts: Sequence[str] | None
    max_rank: int | None
    sequential: bool | None
    statistics: str | os.PathLike[str] | None
    statistics_bytes: MaxBytes
    text_tokens: TextTokens
    batch_size: int
    device: Device
    dtype: torch.dtype
    height: int | None
    width: int | None


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How `GradientFuser` records and solves.

    Args:
        prompts: Recording prompts with ``<TOK>`` for the concept, for all concepts or by kind. They should cover what
            users will prompt: contexts that no prompt shows are not protected. Default: see `prompts`.
        steps: Denoising steps; of DPM-Solver for Stable Diffusion.
        guidance_scale: Guidance while recording; above 1 the conditional and the unconditional half are recorded.
            None is the model's usual value: 7.5 for Stable Diffusion, 5 for SDXL, 3 for Toyland, of others their own.
        negative_prompt: Prompt of the unconditional half; None is the empty prompt.
        seeds: Every prompt is sampled once with each of them.
        ridge: Ridge penalty, as a fraction of the mean squared feature. ``auto`` holds out every fourth prompt while
            recording and chooses each layer's ridge by the error on them. Default: 2.5e-5 for each input feature of
            the layer in stages, ten times that with each concept's own model; more than 1280 features count as 1280.
        prior: Weight of keeping the base's outputs on prompts without any concept, relative to all concepts together;
            0 records none. A higher weight changes prompts without concepts less, and keeps concepts less.
        prior_prompts: Prompts without concepts for `prior`; the concepts' class words are added. Default: see
            `prompts`.
        max_rank: Fused updates of a higher rank are truncated to it; the report says what that loses.
        sequential: Record the text keys and values on top of the fused text encoder, and the remaining layers on top
            of both, as the paper does. False records all layers at once with the concept's own LoRA: such statistics
            do not depend on the other sources, so they are kept beside each source and reused. Default: True with a
            pipeline.
        statistics: Folder in which statistics are kept, instead of beside the sources.
        statistics_bytes: Size of a concept's saved statistics; None keeps them in full, some 400 MB for SD 1.5.
            ``auto`` is 10 MB, and more for bases that are wider than SD 1.5.
        text_tokens: Positions of a prompt that are recorded in the text encoder: ``all`` 77, the ``unpadded`` ones
            up to the end token, or of these the ``concept`` tokens and the end token. For prompts without concepts,
            as of plain LoRAs, ``concept`` is ``unpadded``.
        batch_size: Pictures sampled together.
        device: Where layers are solved, in float64, such as ``cuda``. The fused layers are returned on the CPU.
        dtype: Dtype of the fused layers in the pack's file.
        height: Height of the recorded pictures in pixels; the model's own by default.
        width: Width of the recorded pictures in pixels; the model's own by default.

    Raises:
        FusionError: If a setting is invalid.
    """

    prompts: PromptSet | None = None
    steps: int = Recording.steps
    guidance_scale: float | None = Recording.guidance_scale
    negative_prompt: str | None = Recording.negative_prompt
    seeds: Sequence[int] = Recording.seeds
    ridge: Ridge | None = None
    prior: float = 0.0
    prior_prompts: Sequence[str] | None = None
    max_rank: int | None = None
    sequential: bool | None = None
    statistics: str | os.PathLike[str] | None = None
    statistics_bytes: MaxBytes = "auto"
    text_tokens: TextTokens = Recording.text_tokens
    batch_size: int = Recording.batch_size
    device: Device = "cpu"
    dtype: torch.dtype = torch.float16
    height: int | None = Recording.height
    width: int | None = Recording.width

    def __post_init__(self) -> None:
        """Check all settings."""
        if not 0 <= self.prior < float("inf"):
            raise FusionError(f"prior must be a number of 0 or more, got {self.prior}.")
        if isinstance(self.seeds, str) or not isinstance(self.seeds, Iterable):
            raise FusionError(f"seeds must be a list of whole numbers, such as [0, 1], got {self.seeds!r}.")
        refuse_other_sizes(self.statistics_bytes)
        check_device(self.device)
        _ = self.recording, self.settings  # their constructors check their own fields

    @property
    def recording(self) -> Recording:
        """How concepts are sampled."""
        own = {field.name: getattr(self, field.name) for field in fields(Recording) if hasattr(self, field.name)}
        return Recording(**own | {"seeds": tuple(self.seeds)})

    @property
    def settings(self) -> Settings:
        """How layers are solved."""
        return Settings(ridge=self.ridge, max_rank=self.max_rank, in_stages=bool(self.sequential))

    def resolve(self, pipe: FusablePipeline | None) -> FusionConfig:
        """Fill in the defaults that depend on whether there is a pipeline.

        Raises:
            FusionError: If a setting needs a pipeline and there is none.
        """
        if self.sequential and pipe is None:
            raise FusionError("sequential=True samples with a model; give GradientFuser a pipeline.")
        if self.prior > 0 and pipe is None:
            raise FusionError(f"prior is {self.prior}, which samples the base; give GradientFuser a pipeline.")
        return replace(self, sequential=pipe is not None if self.sequential is None else self.sequential)
