"""Anima, on Cosmos Predict 2's transformer: blocks with a self-attention and a cross-attention to the text.

diffusers has only a modular pipeline for it, which fusion cannot record: its LoRAs are read, written, and merged by
methods that use the updates alone. PixArt, LTX-Video and others name their layers in the same way; Anima is recognised
by the width of its text states and by the names of its original code.
"""

from __future__ import annotations

import re

from diffusers_mixofshow.families.family import BaseModel, Family
from diffusers_mixofshow.families.original_code import in_block, one
from diffusers_mixofshow.families.transformer import groups, text_first


_ATTENTION = r"attn[12]\.(to_[qkv]|to_out\.0)"
_MODULATION = r"norm[123]\.linear_[12]"
_ORIGINAL = in_block(
    "blocks.N",
    "transformer_blocks.N",
    {
        f"{called}.{inner}": one(f"{path}.{ours}")
        for called, path in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for inner, ours in zip(
            ("q_proj", "k_proj", "v_proj", "output_proj"), ("to_q", "to_k", "to_v", "to_out.0"), strict=True
        )
    }
    | {
        f"adaln_modulation_{part}.{number}": one(f"norm{place}.linear_{number}")
        for place, part in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for number in (1, 2)
    }
    | {"mlp.layer1": one("ff.net.0.proj"), "mlp.layer2": one("ff.net.2")},
)

ANIMA = Family(
    name="Anima",
    pipeline="",
    denoiser="transformer",
    denoiser_class="CosmosTransformer3DModel",
    text_encoders={},
    adapted=re.compile(rf"transformer_blocks\.\d+\.{_ATTENTION}"),
    linear=re.compile(rf"transformer_blocks\.\d+\.({_ATTENTION}|{_MODULATION}|ff\.net\.(0\.proj|2))"),
    inputs=(
        (re.compile(r"transformer\..*\.norm[123]\.linear_1"), "transformer.modulation"),
        (re.compile(r"transformer\..*\.attn2\.to_[kv]"), "transformer.text"),
        (re.compile(r"(transformer\..*\.attn1)\.(to_q|to_k|to_v)"), r"\1.to_q+to_k+to_v"),
    ),
    stages=text_first(r"transformer\..*\.attn2\.to_[kv]"),
    groups=groups(
        cross_k_v=r".*\.attn2\.to_[kv]",
        attention=r".*\.attn[12]\..*",
        modulation=r".*\.norm[123]\..*",
        feed_forward=r".*\.ff\..*",
    ),
    models=(BaseModel(name="Anima", kohya="anima", text_width=1024, stream_widths=(2048,), guidance=4.0),),
    original=_ORIGINAL,
    shared_names="diffusion_model.{original}",
)
