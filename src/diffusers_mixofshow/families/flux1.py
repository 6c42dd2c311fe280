"""FLUX.1: double blocks with a stream each for picture and text, then single blocks with one for both."""

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


_DOUBLE = rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD}|norm1(_context)?\.linear)"
_SINGLE = r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"

FLUX1 = Family(
    name="FLUX.1",
    pipeline="FluxPipeline",
    denoiser="transformer",
    denoiser_class="FluxTransformer2DModel",
    text_encoders={"text_encoder": clip_with("tokenizer")},
    adapted=re.compile(rf"(single_)?transformer_blocks\.\d+\.{ATTENTION}"),
    linear=re.compile(f"{_DOUBLE}|{_SINGLE}"),
    inputs=(
        (
            re.compile(r"(transformer\.single_transformer_blocks\.\d+)\.(attn\.to_[qkv]|proj_mlp)"),
            r"\1.attn.to_q+attn.to_k+attn.to_v+proj_mlp",
        ),
        (re.compile(r"transformer\..*\.norm(1|1_context)?\.linear"), "transformer.modulation"),
        QUERY_KEY_VALUE,
        OF_TEXT,
        SHARED_INPUT,
    ),
    stages=text_first(r"text_encoder\..*"),
    groups=groups(
        text_encoder=r"text_encoder\..*",
        attention=r".*\.attn\..*",
        modulation=r".*\.norm[^.]*\.linear",
        feed_forward=r".*\.(ff(_context)?\..*|proj_mlp|proj_out)",
    ),
    models=(BaseModel(name="FLUX.1", kohya="flux1", id="black-forest-labs/FLUX.1-dev", guidance=3.5),),
    takes_negative_prompt=False,
)
