"""Stable Diffusion 3 and 3.5: blocks with separate picture and text streams; ``attn2`` is a second self-attention."""

from __future__ import annotations

import re

from diffusers_mixofshow.families.clip import SHARED_INPUT, clip_text_encoder
from diffusers_mixofshow.families.family import BaseModel, Family
from diffusers_mixofshow.families.original_code import in_block, one, stack
from diffusers_mixofshow.families.stable_diffusion import EMBEDDED
from diffusers_mixofshow.families.transformer import (
    ATTENTION,
    FEED_FORWARD,
    OF_TEXT,
    QUERY_KEY_VALUE,
    groups,
    text_first,
)


_ATTENTION = rf"({ATTENTION}|attn2\.(to_[qkv]|to_out\.0))"
_ORIGINAL = in_block(
    "joint_blocks.N",
    "transformer_blocks.N",
    {
        "x_block.attn.qkv": stack("attn.to_q", "attn.to_k", "attn.to_v"),
        "x_block.attn2.qkv": stack("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "context_block.attn.qkv": stack("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "x_block.attn.proj": one("attn.to_out.0", rows=1),
        "x_block.attn2.proj": one("attn2.to_out.0", rows=1),
        "context_block.attn.proj": one("attn.to_add_out", rows=1),
        "x_block.mlp.fc1": one("ff.net.0.proj", rows=4),
        "x_block.mlp.fc2": one("ff.net.2", rows=1, width=4),
        "context_block.mlp.fc1": one("ff_context.net.0.proj", rows=4),
        "context_block.mlp.fc2": one("ff_context.net.2", rows=1, width=4),
        "x_block.adaLN_modulation.1": one("norm1.linear"),
        # In the last block, which does not update the text, it has only a shift and a scale.
        "context_block.adaLN_modulation.1": one("norm1_context.linear", swapped=2),
    },
)

SD35 = BaseModel(
    name="Stable Diffusion 3.5",
    kohya="sd3",
    id="stabilityai/stable-diffusion-3.5-medium",
    guidance=7.0,
    stream_widths=(1536, 2432),
)
EMBEDDED_SD3 = BaseModel(
    name="Toyland's transformer, a base in diffusers-mixofshow-bases",
    kohya="toyland-sd3",
    id="toyland-sd3",
    license=EMBEDDED.license,
    guidance=EMBEDDED.guidance,
    least_resolution=EMBEDDED.least_resolution,
    standing=EMBEDDED.standing,
    classes=EMBEDDED.classes,
    stream_widths=(160,),
)

STABLE_DIFFUSION_3 = Family(
    name="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    denoiser="transformer",
    denoiser_class="SD3Transformer2DModel",
    text_encoders={"text_encoder": clip_text_encoder("tokenizer"), "text_encoder_2": clip_text_encoder("tokenizer_2")},
    adapted=re.compile(rf"transformer_blocks\.\d+\.{_ATTENTION}"),
    linear=re.compile(rf"transformer_blocks\.\d+\.({_ATTENTION}|{FEED_FORWARD}|norm1(_context)?\.linear)"),
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
    models=(SD35, EMBEDDED_SD3),
    original=_ORIGINAL,
    shared_names="transformer.{path}",
)
