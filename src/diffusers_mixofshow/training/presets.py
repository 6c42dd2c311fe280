"""Named sets of training settings, each written as what differs from `TrainingConfig`'s defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_mixofshow.base_models import TOYLAND


PRESETS: dict[str, dict[str, Any]] = {
    TOYLAND: {
        "pretrained_model_name_or_path": TOYLAND,
        "resolution": 64,
        "crop_variants": 1,
        "train_batch_size": 12,
        "captions_per_step": 3,
        "max_train_steps": 250,
        "embedding_phase_steps": 50,
        "embedding_learning_rate": 1e-2,
        "text_encoder_lr": 1e-3,
        "learning_rate": 6e-3,
        "masked_loss": False,
        "lr_warmup_steps": 10,
        "checkpointing_steps": None,
        "num_validation_images": 0,
        "save_statistics": False,
    },
}

_ON_ANY_BASE = (TOYLAND, "character", "object", "scene")
"""Presets that say what is learnt; the others have rates and sizes that are Stable Diffusion's."""


def layered(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Put the preset that ``settings["preset"]`` names, and the embedded base's own settings, below the given ones.

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
    on_toyland = (chosen | given).get("pretrained_model_name_or_path") == TOYLAND
    if on_toyland and preset in PRESETS and preset not in _ON_ANY_BASE:
        defects.append(
            f"preset is {preset!r}, which has Stable Diffusion's rates and sizes; the embedded base brings its own, "
            "leave the preset out"
        )
    if "rank" in given and "lora_alpha" not in given and _is_count(given["rank"]):
        given["lora_alpha"] = float(given["rank"])
    return (PRESETS[TOYLAND] if on_toyland else {}) | chosen | given, defects


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1
