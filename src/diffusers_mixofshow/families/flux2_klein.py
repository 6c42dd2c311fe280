"""FLUX.2 klein: like FLUX.1, but with fused matrices in single blocks and one modulation for all blocks of a kind."""

from __future__ import annotations

import re

from diffusers_mixofshow.families.family import BaseModel, Family
from diffusers_mixofshow.families.original_code import in_block, one
from diffusers_mixofshow.families.transformer import (
    ATTENTION,
    OF_TEXT,
    ONE_STAGE,
    QUERY_KEY_VALUE,
    TWO_STREAMS,
    groups,
)


_MODULATION = r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.linear"
_ORIGINAL = {
    **in_block(
        "double_blocks.N",
        "transformer_blocks.N",
        {
            **TWO_STREAMS,
            "img_mlp.0": one("ff.linear_in", rows=6),
            "img_mlp.2": one("ff.linear_out", rows=1, width=3),
            "txt_mlp.0": one("ff_context.linear_in", rows=6),
            "txt_mlp.2": one("ff_context.linear_out", rows=1, width=3),
        },
    ),
    **in_block(
        "single_blocks.N",
        "single_transformer_blocks.N",
        {
            "linear1": one("attn.to_qkv_mlp_proj", rows=9),
            "linear2": one("attn.to_out", rows=1, width=4),
        },
    ),
    "double_stream_modulation_img.lin": one("double_stream_modulation_img.linear", rows=6),
    "double_stream_modulation_txt.lin": one("double_stream_modulation_txt.linear", rows=6),
    "single_stream_modulation.lin": one("single_stream_modulation.linear", rows=3),
}

FLUX2_KLEIN = Family(
    name="FLUX.2 klein",
    pipeline="Flux2KleinPipeline",
    denoiser="transformer",
    denoiser_class="Flux2Transformer2DModel",
    text_encoders={},
    adapted=re.compile(
        rf"transformer_blocks\.\d+\.{ATTENTION}|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    ),
    linear=re.compile(
        rf"transformer_blocks\.\d+\.({ATTENTION}|(ff|ff_context)\.linear_(in|out))"
        rf"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)|{_MODULATION}"
    ),
    inputs=((re.compile(rf"transformer\.{_MODULATION}"), "transformer.modulation"), QUERY_KEY_VALUE, OF_TEXT),
    stages=ONE_STAGE,
    groups=groups(
        attention=r".*\.attn\..*",
        modulation=r".*_modulation.*",
        feed_forward=r".*\.ff(_context)?\..*",
    ),
    models=(
        BaseModel(
            name="FLUX.2 klein",
            kohya="flux2",
            id="black-forest-labs/FLUX.2-klein-4B",
            guidance=1.0,
            stream_widths=(3072, 4096),
        ),
    ),
    takes_negative_prompt=False,
    original=_ORIGINAL,
    shared_names="diffusion_model.{original}",
)
