"""Estimate the time of U-Net passes for a dry run: measured for embedded bases, only counted for any other."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from diffusers_mixofshow.base_models import dtype_argument, find_embedded, normalise_name


_MEASURED = 3
"""Number of timed passes beside a first one to warm up; the fastest counts."""


def estimate_time(
    base: str, passes: int, batch: int, *, pixels: tuple[int, int] | None = None, backward: bool = False
) -> str:
    """Describe the least time that a number of U-Net passes takes, or say that it is not known.

    The U-Nets of embedded bases are small enough to be loaded and timed; other models are not loaded.

    Args:
        base: The base model.
        passes: How often the U-Net runs.
        batch: Samples in each pass, both halves of guidance counted.
        pixels: Height and width of the pictures; the model's own by default.
        backward: Whether each pass has a backward pass, as in training.
    """
    way = "there and back " if backward else ""
    folder = find_embedded().get(normalise_name(base))
    if folder is None or not (folder / "unet").is_dir():
        return f"{passes} times that of one U-Net pass {way}on your device; not measured, as no model is loaded"
    seconds = _measure(folder, batch, pixels, backward=backward)
    return (
        f"at least {_format_seconds(passes * seconds)} on this CPU: {passes} U-Net passes {way}of "
        f"{1000 * seconds:.0f} ms, measured just now as the quickest of {_MEASURED}; texts, pictures and loading come "
        "on top, and other work of this machine"
    )


def _measure(folder: Path, batch: int, pixels: tuple[int, int] | None, *, backward: bool) -> float:
    """Seconds of one pass of an embedded base's U-Net."""
    import torch
    from diffusers import UNet2DConditionModel

    from diffusers_mixofshow.families.clip import POSITIONS
    from diffusers_mixofshow.families.layers import default_size

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **dtype_argument(torch.float32))
    decoder = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    scale = 2 ** (len(decoder["block_out_channels"]) - 1)
    height, width = (side // scale for side in pixels) if pixels else default_size(unet)
    unet.requires_grad_(False)
    sample = torch.zeros(batch, unet.config.in_channels, height, width, requires_grad=backward)
    text = torch.zeros(batch, POSITIONS, unet.config.cross_attention_dim)
    more = _make_further_inputs(unet, batch)
    best = float("inf")
    with torch.set_grad_enabled(backward):
        for _ in range(_MEASURED + 1):
            start = time.perf_counter()
            drawn = unet(sample, 1, text, **more).sample
            if backward:
                drawn.sum().backward()
            best = min(best, time.perf_counter() - start)
    return best


def _make_further_inputs(unet: Any, batch: int) -> dict[str, Any]:
    """What SDXL's U-Net reads beside the text: the pooled vector and six sizes; nothing for other U-Nets."""
    import torch

    if unet.config.addition_embed_type != "text_time":
        return {}
    of_sizes = 6 * unet.config.addition_time_embed_dim
    pooled = torch.zeros(batch, unet.config.projection_class_embeddings_input_dim - of_sizes)
    return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.zeros(batch, 6)}}


def _format_seconds(seconds: float) -> str:
    return f"{max(seconds, 1):.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
