"""Stable Diffusion 3 and 3.5: blocks with a stream each for picture and text; ``attn2`` is a second self-attention."""

from __future__ import annotations

import re

from diffusers_mixofshow.families.clip import SHARED_INPUT, clip_with
from diffusers_mixofshow.families.family import BaseModel, Family
from diffusers_mixofshow.families.transformer import (
    ATTENTION,
    FEED_FORWARD,
    OF_TEXT,
    QUERY_KEY_VALUE,
    groups,
    text_first,
)


STABLE_DIFFUSION_3 = Family(
    name="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    denoiser="transformer",
    denoiser_class="SD3Transformer2DModel",
    text_encoders={"text_encoder": clip_with("tokenizer"), "text_encoder_2": clip_with("tokenizer_2")},
    adapted=re.compile(rf"transformer_blocks\.\d+\.{ATTENTION}"),
    linear=re.compile(rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD}|norm1(_context)?\.linear)"),
    inputs=(
        (re.compile(r"transformer\..*\.norm1(_context)?\.linear"), "transformer.modulation"),
        QUERY_KEY_VALUE,
        OF_TEXT,
        SHARED_INPUT,
    ),
    stages=text_first(r"text_encoder(_2)?\..*"),
    groups=groups(
        text_encoder=r"text_encoder.*",
        attention=r".*\.attn2?\..*",
        modulation=r".*\.norm1.*",
        feed_forward=r".*\.ff.*",
    ),
    models=(
        BaseModel(
            name="Stable Diffusion 3.5", kohya="sd3", id="stabilityai/stable-diffusion-3.5-medium", guidance=7.0
        ),
    ),
)
