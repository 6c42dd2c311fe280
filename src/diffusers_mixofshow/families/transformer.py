"""Common parts of the families whose denoiser is a transformer over text and picture."""

from __future__ import annotations

import re

from diffusers_mixofshow.families.family import ANY_SITE, Stage
from diffusers_mixofshow.families.original_code import one, stack


QUERY_KEY_VALUE = (re.compile(r"(.*\.(?:attn|attn2|attention))\.(to_q|to_k|to_v)"), r"\1.to_q+to_k+to_v")
"""The queries, keys and values of an attention share their input."""
OF_TEXT = (
    re.compile(r"(.*\.attn)\.(add_q_proj|add_k_proj|add_v_proj)"),
    r"\1.add_q_proj+add_k_proj+add_v_proj",
)
"""The queries, keys and values of the text stream share their input."""

ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)"

TWO_STREAMS = {
    "img_attn.qkv": stack("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": stack("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": one("attn.to_out.0", rows=1),
    "txt_attn.proj": one("attn.to_add_out", rows=1),
}
"""The attention of a double block, as the original code of FLUX names it."""

ONE_STAGE = (Stage(name="transformer", sites=ANY_SITE, text_alone=False),)
"""Text and picture interact in every block, so that all inputs depend on the denoising step."""


def text_first(sites: str) -> tuple[Stage, ...]:
    """Two stages: sites that match a pattern, whose input is the text alone, then the rest of the transformer."""
    return (Stage(name="text", sites=re.compile(sites), text_alone=True), *ONE_STAGE)


def groups(**patterns: str) -> dict[str, re.Pattern[str]]:
    """Groups for reports: label to a pattern of site names; sites without a match are in ``other``."""
    return {name.replace("_", " "): re.compile(pattern) for name, pattern in patterns.items()} | {"other": ANY_SITE}
