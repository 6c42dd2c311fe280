"""Named sets of training settings, which replace `TrainingConfig`'s defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_mixofshow.base_models import TOYLAND, embedded_base, known_family
from diffusers_mixofshow.families.sdxl import STABLE_DIFFUSION_XL


PRESETS: dict[str, dict[str, Any]] = {
    TOYLAND: {
        "pretrained_model_name_or_path": TOYLAND,
        "resolution": 64,
        "crop_variants": 1,
        "train_batch_size": 12,
        "captions_per_step": 3,
        # A phase of embeddings alone: fusion solves for the LoRA's layers only, and keeps embeddings as they are.
        "max_train_steps": 200,
        "embedding_phase_steps": 200,
        # With a higher rate of embeddings, or of text keys and values, a concept loses its class beside others.
        "embedding_learning_rate": 5e-3,
        "text_encoder_learning_rate": 1e-3,
        "learning_rate": 7e-4,
        "masked_loss": False,
        "lr_warmup_steps": 10,
        "checkpointing_steps": None,
        "save_statistics": False,
    },
    # Section 6.1 of arXiv:2305.18292 and the authors' code; settings equal to our defaults are written out, too.
    "paper": {
        "resolution": 512,
        "framing": "place",
        "random_flip": False,
        "company": 0.0,
        "tag_shuffles": 8,
        "train_batch_size": 4,
        "captions_per_step": None,
        "max_train_steps": 800,
        "embedding_phase_steps": 0,
        "embedding_learning_rate": 1e-3,
        "text_encoder_learning_rate": 1e-5,
        "learning_rate": 1e-4,
        "text_kv_learning_rate": None,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 0,
        "adam_weight_decay": 0.01,
        "rank": 4,
        "lora_alpha": 4.0,
        "keep_start_token": False,
        "noise_offset": 0.01,
        "snr_gamma": None,
        "masked_loss": True,
        "initializer_std": 0.013,
        "method": "ed-lora",
        "optimizer": "AdamW",
        "gradient_accumulation_steps": 1,
        "ema_decay": None,
        "embedding_norm_threshold": 0.55,
        "attn_reg_weight": 0.01,
        "reg_full_identity": False,
        "class_data_dir": None,
    },
    # A person's left and right differ, and a square cuts heads or feet off.
    "character": {"kind": "character", "framing": "place", "random_flip": False, "tag_shuffles": 8},
    "object": {"kind": "object", "framing": "crop", "random_flip": True, "tag_shuffles": 8},
    # The whole picture is the concept.
    "scene": {"kind": "scene", "framing": "buckets", "masked_loss": False, "tag_shuffles": 8},
    # For a first try: half the default's steps, and one caption (one layer-wise encoding) per step.
    "fast": {
        "max_train_steps": 400,
        "captions_per_step": 1,
        "embedding_learning_rate": 2e-3,
        "text_encoder_learning_rate": 2e-5,
        "learning_rate": 2e-4,
        "lr_warmup_steps": 20,
    },
    # The default batch of four as four accumulated batches of one, with gradient checkpointing and half precision.
    "low-memory": {
        "train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "mixed_precision": "fp16",
    },
}

OF_SDXL: dict[str, Any] = {"resolution": 1024}
"""Defaults on Stable Diffusion XL, below those of any preset: the resolution that it was trained at.

All others are Stable Diffusion 1.x's, also rates, steps and rank, which have not been measured on SDXL.
"""

_ON_TOYLAND = (TOYLAND, "character", "object", "scene")
"""Presets for the embedded base; the others have rates and resolutions for Stable Diffusion."""
_NOT_ON_SDXL = ("paper",)
"""Presets with Stable Diffusion 1.5's resolution and norm of word embeddings."""


def layer_presets(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Add the defaults of ``settings["preset"]``, and of the base model, to the given settings.

    The embedded base has defaults of its own, and so has SDXL if it is recognised by its id or its files on this disk.
    Given settings win over the preset's, these over the base's. A rank without `lora_alpha` sets that to the same
    number, so that the LoRA's scale stays 1.

    Returns:
        The settings without ``preset``, and what is wrong with the preset.
    """
    given = dict(settings)
    preset = given.pop("preset", None)
    defects = []
    if preset is not None and not (isinstance(preset, str) and preset in PRESETS):
        defects.append(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}")
        preset = None
    chosen = PRESETS.get(str(preset), {})
    base = str((chosen | given).get("pretrained_model_name_or_path"))
    embedded, on_sdxl = embedded_base(base), known_family(base) is STABLE_DIFFUSION_XL
    if embedded and preset in PRESETS and preset not in _ON_TOYLAND:
        defects.append(
            f"preset is {preset!r}, which has Stable Diffusion's rates and sizes; the embedded base brings its own, "
            "leave the preset out"
        )
    if on_sdxl and preset in _NOT_ON_SDXL:
        defects.append(
            f"preset is {preset!r}, which is about Stable Diffusion 1.5: its pictures of 512 pixels and the length of "
            "its words' embeddings; leave the preset out on SDXL, and set what you want of it"
        )
    if "rank" in given and "lora_alpha" not in given and _is_count(given["rank"]):
        given["lora_alpha"] = float(given["rank"])
    if embedded:
        own = PRESETS[TOYLAND] | ({} if preset == TOYLAND else chosen) | {"resolution": embedded.least_resolution}
    else:
        own = (OF_SDXL if on_sdxl else {}) | chosen
    return own | given, defects


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1
