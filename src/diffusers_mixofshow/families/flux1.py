"""FLUX.1: double blocks with separate picture and text streams, then single blocks with one joint stream."""

from __future__ import annotations

import re

from diffusers_mixofshow.families.clip import SHARED_INPUT, clip_text_encoder
from diffusers_mixofshow.families.family import BaseModel, Family
from diffusers_mixofshow.families.original_code import OriginalLayer, in_block, one, stack
from diffusers_mixofshow.families.transformer import (
    ATTENTION,
    FEED_FORWARD,
    OF_TEXT,
    QUERY_KEY_VALUE,
    TWO_STREAMS,
    groups,
    text_first,
)


_DOUBLE = rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD}|norm1(_context)?\.linear)"
_SINGLE = r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
_ORIGINAL = in_block(
    "double_blocks.N",
    "transformer_blocks.N",
    {
        **TWO_STREAMS,
        "img_mlp.0": one("ff.net.0.proj", rows=4),
        "img_mlp.2": one("ff.net.2", rows=1, width=4),
        "txt_mlp.0": one("ff_context.net.0.proj", rows=4),
        "txt_mlp.2": one("ff_context.net.2", rows=1, width=4),
        "img_mod.lin": one("norm1.linear", rows=6),
        "txt_mod.lin": one("norm1_context.linear", rows=6),
    },
) | in_block(
    "single_blocks.N",
    "single_transformer_blocks.N",
    {
        "linear1": OriginalLayer(paths=("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), rows=(1, 1, 1, 4)),
        "linear2": one("proj_out", rows=1, width=5),
        "modulation.lin": one("norm.linear", rows=3),
    },
)
# XLabs' trainer puts LoRAs into attention processors, which gives them these names.
_OF_XLABS = in_block(
    "double_blocks.N",
    "transformer_blocks.N",
    {
        "qkv_lora1": TWO_STREAMS["img_attn.qkv"],
        "qkv_lora2": TWO_STREAMS["txt_attn.qkv"],
        "proj_lora1": TWO_STREAMS["img_attn.proj"],
        "proj_lora2": TWO_STREAMS["txt_attn.proj"],
    },
) | in_block(
    "single_blocks.N",
    "single_transformer_blocks.N",
    {"qkv": stack("attn.to_q", "attn.to_k", "attn.to_v"), "proj": one("proj_out", rows=1, width=5)},
)

FLUX1 = Family(
    name="FLUX.1",
    pipeline="FluxPipeline",
    denoiser="transformer",
    denoiser_class="FluxTransformer2DModel",
    text_encoders={"text_encoder": clip_text_encoder("tokenizer")},
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
    models=(
        BaseModel(
            name="FLUX.1", kohya="flux1", id="black-forest-labs/FLUX.1-dev", guidance=3.5, stream_widths=(3072,)
        ),
    ),
    guidance_learnt=True,
    takes_negative_prompt=False,
    original=_ORIGINAL,
    also_called=_OF_XLABS,
    shared_names="lora_unet_{original}",
)
