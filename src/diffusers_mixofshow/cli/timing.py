"""Estimate the time of a denoiser's passes for a dry run: measured for embedded bases, only counted for any other."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from diffusers_mixofshow.base_models import dtype_argument, find_embedded, normalise_name


MODELS = {"unet": "U-Net", "transformer": "transformer"}
"""Component of a pipeline to what its denoiser is called."""
_TEXTS = 256
"""Positions of the third text encoder of Stable Diffusion 3, beside those of CLIP; without it they are zeros."""
_MEASURED = 3
"""Number of timed passes beside a first one to warm up; the fastest counts."""


def estimate_time(
    base: str,
    passes: int,
    batch: int,
    *,
    pixels: tuple[int, int] | None = None,
    backward: bool = False,
    model: str = MODELS["unet"],
) -> str:
    """Describe the least time that a number of a denoiser's passes takes, or say that it is not known.

    The denoisers of embedded bases are small enough to be loaded and timed; other models are not loaded.

    Args:
        base: The base model.
        passes: How often the denoiser runs.
        batch: Samples in each pass, both halves of guidance counted.
        pixels: Height and width of the pictures; the model's own by default.
        backward: Whether each pass has a backward pass, as in training.
        model: What the denoiser of a base that is not embedded is called, such as ``transformer``.
    """
    way = "forward and backward " if backward else ""
    folder = find_embedded().get(normalise_name(base))
    if folder is None:
        return f"{passes} times that of one {model} pass {way}on your device; not measured, as no model is loaded"
    model, seconds = MODELS[_find_denoiser(folder)], _measure(folder, batch, pixels, backward=backward)
    return (
        f"at least {_format_seconds(passes * seconds)} on this CPU: {passes} {model} passes {way}of "
        f"{1000 * seconds:.0f} ms, measured just now as the quickest of {_MEASURED}; texts, pictures and loading come "
        "on top, and other work of this machine"
    )


def _find_denoiser(folder: Path) -> str:
    """Name of the denoiser among the components of an embedded base."""
    return next(name for name in MODELS if (folder / name).is_dir())


def _measure(folder: Path, batch: int, pixels: tuple[int, int] | None, *, backward: bool) -> float:
    """Seconds of one pass of an embedded base's denoiser."""
    import torch
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    from diffusers_mixofshow.families.layers import default_size

    name = _find_denoiser(folder)
    kind = UNet2DConditionModel if name == "unet" else SD3Transformer2DModel
    denoiser = kind.from_pretrained(folder, subfolder=name, **dtype_argument(torch.float32))
    decoder = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    scale = 2 ** (len(decoder["block_out_channels"]) - 1)
    height, width = (side // scale for side in pixels) if pixels else default_size(denoiser)
    denoiser.requires_grad_(False)
    sample = torch.zeros(batch, denoiser.config.in_channels, height, width, requires_grad=backward)
    make_inputs = _make_inputs if name == "unet" else _make_inputs_of_transformer
    given, more = make_inputs(denoiser, batch)
    best = float("inf")
    with torch.set_grad_enabled(backward):
        for _ in range(_MEASURED + 1):
            start = time.perf_counter()
            drawn = denoiser(sample, *given, **more).sample
            if backward:
                drawn.sum().backward()
            best = min(best, time.perf_counter() - start)
    return best


def _make_inputs(unet: Any, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a U-Net reads beside the sample: step and text; SDXL's also the pooled vector and six sizes."""
    import torch

    from diffusers_mixofshow.families.clip import POSITIONS

    text = torch.zeros(batch, POSITIONS, unet.config.cross_attention_dim)
    if unet.config.addition_embed_type != "text_time":
        return (1, text), {}
    of_sizes = 6 * unet.config.addition_time_embed_dim
    pooled = torch.zeros(batch, unet.config.projection_class_embeddings_input_dim - of_sizes)
    return (1, text), {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.zeros(batch, 6)}}


def _make_inputs_of_transformer(transformer: Any, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the transformer of Stable Diffusion 3 reads beside the sample: text, pooled vector and step."""
    import torch

    from diffusers_mixofshow.families.clip import POSITIONS

    text = torch.zeros(batch, POSITIONS + _TEXTS, transformer.config.joint_attention_dim)
    pooled = torch.zeros(batch, transformer.config.pooled_projection_dim)
    return (text, pooled, torch.ones(batch)), {}


def _format_seconds(seconds: float) -> str:
    return f"{max(seconds, 1):.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
