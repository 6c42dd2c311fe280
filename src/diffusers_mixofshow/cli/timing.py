"""Estimate the time of U-Net passes for a dry run: measured for the embedded base, only counted for any other."""

from __future__ import annotations

import time
from pathlib import Path

from diffusers_mixofshow.base_models import TOYLAND, dtype_argument, location_of


_MEASURED = 3
"""Number of timed passes beside a first one to warm up; the fastest counts."""


def estimate_time(
    base: str, passes: int, batch: int, *, pixels: tuple[int, int] | None = None, backward: bool = False
) -> str:
    """Describe the least time that a number of U-Net passes takes, or say that it is not known.

    The embedded base is small enough to be loaded and timed; other models are not loaded.

    Args:
        base: The base model.
        passes: How often the U-Net runs.
        batch: Samples in each pass, both halves of guidance counted.
        pixels: Height and width of the pictures; the model's own by default.
        backward: Whether each pass has a backward pass, as in training.
    """
    way = "there and back " if backward else ""
    if base != TOYLAND:
        return f"{passes} times that of one U-Net pass {way}on your device; not measured, as no model is loaded"
    seconds = _measure(batch, pixels, backward=backward)
    return (
        f"at least {_format_seconds(passes * seconds)} on this CPU: {passes} U-Net passes {way}of "
        f"{1000 * seconds:.0f} ms, measured just now; texts, pictures and loading come on top"
    )


def _measure(batch: int, pixels: tuple[int, int] | None, *, backward: bool) -> float:
    """Seconds of one pass of the embedded base's U-Net."""
    import torch
    from diffusers import UNet2DConditionModel

    from diffusers_mixofshow.families.clip import POSITIONS
    from diffusers_mixofshow.families.layers import default_size

    folder = Path(location_of(TOYLAND))
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **dtype_argument(torch.float32))
    height, width = default_size(unet)
    scale = 64 // height
    height, width = (side // scale for side in pixels) if pixels else (height, width)
    unet.requires_grad_(False)
    sample = torch.zeros(batch, unet.config.in_channels, height, width, requires_grad=backward)
    text = torch.zeros(batch, POSITIONS, unet.config.cross_attention_dim)
    best = float("inf")
    with torch.set_grad_enabled(backward):
        for _ in range(_MEASURED + 1):
            start = time.perf_counter()
            drawn = unet(sample, 1, text).sample
            if backward:
                drawn.sum().backward()
            best = min(best, time.perf_counter() - start)
    return best


def _format_seconds(seconds: float) -> str:
    return f"{max(seconds, 1):.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
