"""Krea 2: one joint stream for picture and text, after blocks that combine many layers of the text encoder."""

from __future__ import annotations

import re

from diffusers_mixofshow.families.family import BaseModel, Family
from diffusers_mixofshow.families.original_code import in_block, one
from diffusers_mixofshow.families.transformer import groups, text_first


_BLOCK = r"(transformer_blocks|text_fusion\.(layerwise|refiner)_blocks)\.\d+\."
_ATTENTION = r"attn\.(to_[qkv]|to_gate|to_out\.0)"
_ORIGINAL = {
    name: layer
    for called, block in {
        "blocks.N": "transformer_blocks.N",
        "txtfusion.layerwise_blocks.N": "text_fusion.layerwise_blocks.N",
        "txtfusion.refiner_blocks.N": "text_fusion.refiner_blocks.N",
    }.items()
    for name, layer in in_block(
        called,
        block,
        {
            "attn.wq": one("attn.to_q"),
            "attn.wk": one("attn.to_k"),
            "attn.wv": one("attn.to_v"),
            "attn.gate": one("attn.to_gate"),
            "attn.wo": one("attn.to_out.0"),
            "mlp.gate": one("ff.gate"),
            "mlp.up": one("ff.up"),
            "mlp.down": one("ff.down"),
        },
    ).items()
}

KREA2 = Family(
    name="Krea 2",
    pipeline="Krea2Pipeline",
    denoiser="transformer",
    denoiser_class="Krea2Transformer2DModel",
    text_encoders={},
    adapted=re.compile(_BLOCK + _ATTENTION),
    linear=re.compile(rf"{_BLOCK}({_ATTENTION}|ff\.(gate|up|down))"),
    inputs=(
        (re.compile(r"(.*\.attn)\.(to_q|to_k|to_v|to_gate)"), r"\1.to_q+to_k+to_v+to_gate"),
        (re.compile(r"(.*\.ff)\.(gate|up)"), r"\1.gate+up"),
    ),
    stages=text_first(r"transformer\.text_fusion\..*"),
    groups=groups(text_fusion=r".*\.text_fusion\..*", attention=r".*\.attn\..*", feed_forward=r".*\.ff\..*"),
    models=(BaseModel(name="Krea 2", kohya="krea2", guidance=4.5, stream_widths=(6144,)),),
    guidance_off=0.0,
    original=_ORIGINAL,
    shared_names="diffusion_model.{original}",
)
