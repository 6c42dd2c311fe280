"""The CLIP text encoder, shared by several families."""

from __future__ import annotations

import re
from typing import Any

from diffusers_mixofshow.families.family import TextEncoder


_ADAPTED = r"(text_model\.)?encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"
_LINEAR = _ADAPTED + r"|(text_model\.)?encoder\.layers\.\d+\.mlp\.fc[12]"

POSITIONS = 77
"""Tokens of one text, including its start and end token."""

SHARED_INPUT = (re.compile(r"(.*\.self_attn)\.(q_proj|k_proj|v_proj)"), r"\1.q_proj+k_proj+v_proj")
"""The queries, keys and values of a self-attention read one tensor."""

CLIP_L, CLIP_G = "clip_l", "clip_g"
"""Names of OpenAI's CLIP and of the larger OpenCLIP in files of embeddings."""


def clip_text_encoder(tokenizer: str, **fields: Any) -> TextEncoder:
    """A CLIP text encoder with this tokenizer component; further fields as in `TextEncoder`."""
    return TextEncoder(tokenizer=tokenizer, adapted=re.compile(_ADAPTED), linear=re.compile(_LINEAR), **fields)
