"""The U-Net with cross-attention of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusers_mixofshow.families.clip import SHARED_INPUT
from diffusers_mixofshow.families.family import ANY_SITE, BaseModel, Family, Stage, TextEncoder


BLOCKS = ("down_blocks", "mid_block", "up_blocks")
"""The paper's order of layers (section 3.3.1, from P+)."""

_ADAPTED = re.compile(r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)")
_LINEAR = re.compile(
    _ADAPTED.pattern + r"|.*\.(ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|time_emb_proj|conv_shortcut)"
)

_TEXT_ENCODER = re.compile(r"text_encoder(_2)?\..*")
_TEXT_KEYS_AND_VALUES = re.compile(r"unet\..*\.attn2\.(to_k|to_v)")

_STAGES = (
    Stage(name="text encoder", sites=_TEXT_ENCODER, text_alone=True),
    Stage(name="keys and values of the text", sites=_TEXT_KEYS_AND_VALUES, text_alone=True),
    Stage(name="other layers", sites=ANY_SITE, text_alone=False),
)
"""The paper's order (section 3.3.2)."""

_GROUPS = {
    "text": _TEXT_ENCODER,
    "cross k v": _TEXT_KEYS_AND_VALUES,
    "cross q out": re.compile(r".*\.attn2\..*"),
    "self": re.compile(r".*\.attn1\..*"),
    "other": ANY_SITE,
}

_INPUTS = (
    (re.compile(r"(.*\.attn1)\.(to_q|to_k|to_v)"), r"\1.to_q+to_k+to_v"),
    (re.compile(r"(.*\.attn2)\.(to_k|to_v)"), r"\1.to_k+to_v"),
    SHARED_INPUT,
)


def cross_attention_of(blocks: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Cross-attention layers of a U-Net: block to (number of attentions, transformer blocks in each)."""
    return tuple(
        f"{block}.attentions.{attention}.transformer_blocks.{number}.attn2"
        for block, (attentions, numbers) in blocks.items()
        for attention in range(attentions)
        for number in range(numbers)
    )


def unet_family(
    name: str,
    pipeline: str,
    text_encoders: Mapping[str, TextEncoder],
    models: tuple[BaseModel, ...],
    **fields: Any,
) -> Family:
    """A family with this U-Net; `fields` are further ones of `Family`."""
    return Family(
        name=name,
        pipeline=pipeline,
        denoiser="unet",
        denoiser_class="UNet2DConditionModel",
        text_encoders=text_encoders,
        adapted=_ADAPTED,
        linear=_LINEAR,
        blocks=BLOCKS,
        inputs=_INPUTS,
        stages=_STAGES,
        groups=_GROUPS,
        cross_attention="attn2",
        self_attention="attn1",
        sampler="DPMSolverMultistepScheduler",
        models=models,
        **fields,
    )
