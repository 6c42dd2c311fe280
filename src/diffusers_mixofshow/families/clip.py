"""CLIP's text encoder, which several families have."""

from __future__ import annotations

import re
from typing import Any

from diffusers_mixofshow.families.family import TextEncoder


_ADAPTED = r"(text_model\.)?encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"
_LINEAR = _ADAPTED + r"|(text_model\.)?encoder\.layers\.\d+\.mlp\.fc[12]"

POSITIONS = 77
"""Tokens of one text, its start and end counted."""

SHARED_INPUT = (re.compile(r"(.*\.self_attn)\.(q_proj|k_proj|v_proj)"), r"\1.q_proj+k_proj+v_proj")
"""The queries, keys and values of a self-attention read one tensor."""

CLIP_L, CLIP_G = "clip_l", "clip_g"
"""What files of embeddings call the CLIP of OpenAI, and the larger one of OpenCLIP."""


def clip_with(tokenizer: str, **reading: Any) -> TextEncoder:
    """A CLIP text encoder whose tokenizer is this component; what is read of it as `TextEncoder` says."""
    return TextEncoder(tokenizer=tokenizer, adapted=re.compile(_ADAPTED), linear=re.compile(_LINEAR), **reading)
