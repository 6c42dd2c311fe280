"""Named sets of training settings, each written as what differs from `TrainingConfig`'s defaults."""

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
        # What sits in embeddings needs no reconciling when concepts are fused.
        "max_train_steps": 200,
        "embedding_phase_steps": 200,
        # Faster embeddings, or faster keys and values of the text, forget the class as soon as others stand beside it.
        "embedding_learning_rate": 5e-3,
        "text_encoder_learning_rate": 1e-3,
        "learning_rate": 7e-4,
        "masked_loss": False,
        "lr_warmup_steps": 10,
        "checkpointing_steps": None,
        "num_validation_images": 0,
        "save_statistics": False,
    },
    # Section 6.1 of arXiv:2305.18292 and the authors' code, whether a default or not.
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
    # A first look: half the pictures of the default, with one layer-wise encoding a step.
    "fast": {
        "max_train_steps": 400,
        "captions_per_step": 1,
        "embedding_learning_rate": 2e-3,
        "text_encoder_learning_rate": 2e-5,
        "learning_rate": 2e-4,
        "lr_warmup_steps": 20,
    },
    # The four pictures of a step one after another, activations computed again, half precision.
    "low-memory": {
        "train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "mixed_precision": "fp16",
    },
}

OF_SDXL: dict[str, Any] = {"resolution": 1024}
"""What lies below all others on Stable Diffusion XL: the size that it was trained at.

All else is as for Stable Diffusion 1.x, rates, steps and rank as well: not measured, as no base was at hand.
"""

_ON_TOYLAND = (TOYLAND, "character", "object", "scene")
"""Presets that say what is learnt; the others have rates and sizes that are Stable Diffusion's."""
_NOT_ON_SDXL = ("paper",)
"""It has the size of Stable Diffusion 1.5's pictures, and the length of its words."""


def layer_presets(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Put the preset that ``settings["preset"]`` names, and the base's own settings, below the given ones.

    The embedded base has some, and SDXL where it is known for one: by its id, or as it lies on this disk.

    A rank without a `lora_alpha` takes the alpha along, so that the LoRA's scale stays 1.

    Returns:
        The settings without ``preset``, and what is wrong with the preset.
    """
    given = dict(settings)
    preset = given.pop("preset", None)
    defects = []
    if preset is not None and preset not in PRESETS:
        defects.append(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    chosen = PRESETS.get(str(preset), {})
    base = str((chosen | given).get("pretrained_model_name_or_path"))
    on_toyland, on_sdxl = embedded_base(base) is not None, known_family(base) is STABLE_DIFFUSION_XL
    if on_toyland and preset in PRESETS and preset not in _ON_TOYLAND:
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
    own = PRESETS[TOYLAND] if on_toyland else OF_SDXL if on_sdxl else {}
    return own | chosen | given, defects


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1
