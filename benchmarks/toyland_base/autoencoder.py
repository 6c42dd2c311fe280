"""The autoencoder: 64x64 pictures to 16x16 latents of eight channels, each with mean 0 and deviation 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_mixofshow.toyland.scenes import random_scene
from diffusers_mixofshow.toyland.world import HEIGHT, draw


BICUBIC = Image.Resampling.BICUBIC
LATENT_CHANNELS = 8


def render_pixels(
    seeds: Sequence[int], things: int | None = None, height: int = HEIGHT, enlarged_to: int | None = None
) -> torch.Tensor:
    """Random scenes as uint8 (n, 3, height, width).

    Args:
        seeds: Of the scenes.
        things: That of `random_scene`.
        height: Pictures are drawn so high, in pixels.
        enlarged_to: Height to which the drawn pictures are enlarged.
    """
    images = [draw(random_scene(seed, things=things), height).image for seed in seeds]
    if enlarged_to is not None:
        images = [image.resize((image.width * enlarged_to // height, enlarged_to), BICUBIC) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder of factor 4 whose latents start almost without noise."""
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    with torch.no_grad():
        model.quant_conv.bias[LATENT_CHANNELS:] = -6.0
        model.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
    return model


class AutoencoderObjective(torch.nn.Module):
    """L1 + 2 MSE + half an L1 of the picture's differences + 5e-5 KL."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Loss of a batch (n, 3, height, width) in [-1, 1]."""
        posterior = self.model.encode(pixels).latent_dist
        result = self.model.decode(posterior.sample()).sample
        error = result - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 5e-5 * divergence


def random_crops(pool: torch.Tensor, count: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """`count` random square crops of a uint8 pool, half of them mirrored, in [-1, 1]."""
    indices = torch.randint(len(pool), (count,), generator=generator).tolist()
    tops = torch.randint(pool.shape[2] - side + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(pool.shape[3] - side + 1, (count,), generator=generator).tolist()
    crops = [
        pool[i, :, top : top + side, left : left + side] for i, top, left in zip(indices, tops, lefts, strict=True)
    ]
    stacked = torch.stack(crops).float() / 127.5 - 1
    return torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, stacked.flip(-1), stacked)


@torch.no_grad()
def whiten(model: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Fold a shift and scale per latent channel into the outer convolutions, so that latents have mean 0, deviation 1.

    Reconstructions stay as they are; nothing but the two 1x1 convolutions around the latents changes.

    Args:
        pixels: Pictures in [-1, 1] that the statistics are taken from.
    """
    latents = torch.cat([model.encode(part).latent_dist.mean for part in pixels.split(64)])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    inner, outer = model.quant_conv, model.post_quant_conv
    inner.weight[:channels] /= deviation[:, None, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) / deviation
    inner.bias[channels:] -= 2 * deviation.log()
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= deviation[None, :, None, None]


@torch.no_grad()
def reconstruct(model: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """One encode (the mean) and decode, clipped to [-1, 1]."""
    parts = [model.decode(model.encode(part).latent_dist.mode()).sample for part in pixels.split(64)]
    return torch.cat(parts).clamp(-1, 1)


def peak_signal_to_noise(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean PSNR in dB of pictures in [-1, 1]."""
    error = ((result - truth) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.clamp_min(1e-10).log10()).mean())
