"""Qwen-Image: blocks with separate picture and text streams."""

from __future__ import annotations

import re

from diffusers_mixofshow.families.family import BaseModel, Family
from diffusers_mixofshow.families.original_code import in_block, same_names
from diffusers_mixofshow.families.transformer import ATTENTION, OF_TEXT, ONE_STAGE, QUERY_KEY_VALUE, groups


_BLOCK = "transformer_blocks.N"
_ORIGINAL = in_block(
    _BLOCK,
    _BLOCK,
    same_names(
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *(f"{stream}_{part}" for stream in ("img", "txt") for part in ("mlp.net.0.proj", "mlp.net.2", "mod.1")),
    ),
)

QWEN_IMAGE = Family(
    name="Qwen-Image",
    pipeline="QwenImagePipeline",
    denoiser="transformer",
    denoiser_class="QwenImageTransformer2DModel",
    text_encoders={},
    adapted=re.compile(rf"transformer_blocks\.\d+\.{ATTENTION}"),
    linear=re.compile(rf"transformer_blocks\.\d+\.({ATTENTION}|(img|txt)_mlp\.net\.(0\.proj|2)|(img|txt)_mod\.1)"),
    inputs=(
        (re.compile(r"transformer\..*\.(img|txt)_mod\.1"), "transformer.modulation"),
        QUERY_KEY_VALUE,
        OF_TEXT,
    ),
    stages=ONE_STAGE,
    groups=groups(attention=r".*\.attn\..*", modulation=r".*_mod\.1", feed_forward=r".*_mlp\..*"),
    models=(
        BaseModel(name="Qwen-Image", kohya="qwen_image", id="Qwen/Qwen-Image", guidance=4.0, stream_widths=(3072,)),
    ),
    guidance_argument="true_cfg_scale",
    original=_ORIGINAL,
    shared_names="diffusion_model.{path}",
)
