"""FLUX.2 klein: as FLUX.1, but its single blocks have fused matrices and all blocks of a kind one modulation."""

from __future__ import annotations

import re

from diffusers_mixofshow.families.family import BaseModel, Family
from diffusers_mixofshow.families.transformer import ATTENTION, OF_TEXT, ONE_STAGE, QUERY_KEY_VALUE, groups


_MODULATION = r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.linear"

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
    models=(BaseModel(name="FLUX.2 klein", kohya="flux2", id="black-forest-labs/FLUX.2-klein-4B", guidance=1.0),),
    takes_negative_prompt=False,
)
