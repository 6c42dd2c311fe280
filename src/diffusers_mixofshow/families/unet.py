"""The U-Net with cross-attention, which Stable Diffusion 1.x, 2.x and XL share."""

from __future__ import annotations

import re
from collections.abc import Mapping

from diffusers_mixofshow.families.clip import SHARED_INPUT
from diffusers_mixofshow.families.family import Stage


BLOCKS = ("down_blocks", "mid_block", "up_blocks")
"""The paper's order of layers (section 3.3.1, from P+)."""

ADAPTED = re.compile(r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)")
LINEAR = re.compile(
    ADAPTED.pattern + r"|.*\.(ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|time_emb_proj|conv_shortcut)"
)

_TEXT_ENCODER = re.compile(r"text_encoder(_2)?\..*")
_TEXT_KEYS_AND_VALUES = re.compile(r"unet\..*\.attn2\.(to_k|to_v)")
_ANY = re.compile(r".*")

STAGES = (
    Stage(name="text encoder", sites=_TEXT_ENCODER, text_alone=True),
    Stage(name="keys and values of the text", sites=_TEXT_KEYS_AND_VALUES, text_alone=True),
    Stage(name="other layers", sites=_ANY, text_alone=False),
)
"""The paper's order (section 3.3.2)."""

GROUPS = {
    "text": _TEXT_ENCODER,
    "cross k v": _TEXT_KEYS_AND_VALUES,
    "cross q out": re.compile(r".*\.attn2\..*"),
    "self": re.compile(r".*\.attn1\..*"),
    "other": _ANY,
}

INPUTS = (
    (re.compile(r"(.*\.attn1)\.(to_q|to_k|to_v)"), r"\1.to_q+to_k+to_v"),
    (re.compile(r"(.*\.attn2)\.(to_k|to_v)"), r"\1.to_k+to_v"),
    SHARED_INPUT,
)


def cross_attention_of(blocks: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Cross-attention layers of blocks that have (attentions, transformer blocks in each)."""
    return tuple(
        f"{block}.attentions.{attention}.transformer_blocks.{number}.attn2"
        for block, (attentions, numbers) in blocks.items()
        for attention in range(attentions)
        for number in range(numbers)
    )
