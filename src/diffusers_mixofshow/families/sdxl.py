"""Stable Diffusion XL: a U-Net that reads the concatenated states of two CLIPs and the pooled vector of the second."""

from __future__ import annotations

import re
from typing import Any

from diffusers_mixofshow.families.clip import CLIP_G, CLIP_L, clip_text_encoder
from diffusers_mixofshow.families.family import BaseModel
from diffusers_mixofshow.families.stable_diffusion import EMBEDDED
from diffusers_mixofshow.families.unet import cross_attention_of, unet_family


SDXL = BaseModel(
    name="Stable Diffusion XL",
    kohya="sdxl_base_v1-0",
    text_width=2048,
    embeddings={CLIP_L: 768, CLIP_G: 1280},
    other_ids=("stabilityai/stable-diffusion-xl-base-1.0",),
    linear_projections=True,
    license="openrail++",
    guidance=5.0,
    resolution=1024,
    least_resolution=768,
    layers=cross_attention_of(
        {"down_blocks.1": (2, 2), "down_blocks.2": (2, 10), "mid_block": (1, 10)}
        | {"up_blocks.0": (3, 10), "up_blocks.1": (3, 2)}
    ),
)
EMBEDDED_XL = BaseModel(
    name="Toyland's Stable Diffusion XL, a base in diffusers-mixofshow-bases",
    kohya="toyland-xl",
    text_width=160,
    embeddings={CLIP_L: 32, CLIP_G: 128},
    layers=cross_attention_of(
        {"down_blocks.1": (1, 2), "down_blocks.2": (1, 1), "mid_block": (1, 1)}
        | {"up_blocks.0": (2, 1), "up_blocks.1": (2, 2)}
    ),
    id="toyland-xl",
    linear_projections=True,
    license=EMBEDDED.license,
    guidance=EMBEDDED.guidance,
    least_resolution=96,
    standing=EMBEDDED.standing,
    classes=EMBEDDED.classes,
)

_PENULTIMATE: dict[str, Any] = {"skipped": 1, "final_norm": False}
"""The U-Net reads the output of the penultimate layer, without the final norm."""

STABLE_DIFFUSION_XL = unet_family(
    "Stable Diffusion XL",
    "StableDiffusionXLPipeline",
    {
        "text_encoder": clip_text_encoder("tokenizer", **_PENULTIMATE),
        "text_encoder_2": clip_text_encoder("tokenizer_2", pooled=True, **_PENULTIMATE),
    },
    (SDXL, EMBEDDED_XL),
    concept_pipeline="MixOfShowXLPipeline",
    marks={"addition_embed_type": "text_time"},
    unmarked={"add_watermarker": False},
    embedding_groups=(re.compile(r"(.*\.attentions\.\d+)\..*"), r"\1"),
)
