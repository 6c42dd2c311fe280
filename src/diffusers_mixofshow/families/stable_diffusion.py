"""Stable Diffusion 1.x and 2.x, and the embedded base: a U-Net that reads the states of one CLIP."""

from __future__ import annotations

from diffusers_mixofshow.families.clip import CLIP_L, clip_text_encoder
from diffusers_mixofshow.families.family import BaseModel
from diffusers_mixofshow.families.unet import cross_attention_of, unet_family


_LAYERS = cross_attention_of(
    {f"down_blocks.{block}": (2, 1) for block in range(3)}
    | {"mid_block": (1, 1)}
    | {f"up_blocks.{block}": (3, 1) for block in range(1, 4)}
)

SD1 = BaseModel(
    name="Stable Diffusion 1.x",
    kohya="sd_v1",
    text_width=768,
    embeddings={CLIP_L: 768},
    layers=_LAYERS,
    id="stable-diffusion-v1-5/stable-diffusion-v1-5",
    other_ids=("runwayml/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4"),
    license="creativeml-openrail-m",
    resolution=512,
)
SD2 = BaseModel(
    name="Stable Diffusion 2.x",
    kohya="sd_v2",
    text_width=1024,
    embeddings={CLIP_L: 1024},
    layers=_LAYERS,
    linear_projections=True,
)
EMBEDDED = BaseModel(
    name="Toyland, the base in diffusers-mixofshow",
    kohya="toyland",
    text_width=128,
    embeddings={CLIP_L: 128},
    layers=cross_attention_of(
        {"down_blocks.1": (1, 1), "down_blocks.2": (1, 1), "mid_block": (1, 1)}
        | {"up_blocks.0": (2, 1), "up_blocks.1": (2, 1)}
    ),
    id="toyland",
    license="apache-2.0",
    guidance=3.0,
    least_resolution=64,
    standing=(0.25, 0.97),
    classes=("critter", "dog", "cat", "vase", "chair", "table"),
)

STABLE_DIFFUSION = unet_family(
    "Stable Diffusion",
    "StableDiffusionPipeline",
    {"text_encoder": clip_text_encoder("tokenizer")},
    (SD1, SD2, EMBEDDED),
    concept_pipeline="MixOfShowPipeline",
    unmarked={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
)
