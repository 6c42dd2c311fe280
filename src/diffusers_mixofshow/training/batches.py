"""Photos to cached latents, and cached latents to random training batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.framing import Crop, crops_of, mask_on_latents
from diffusers_mixofshow.training.losses import offset_noise
from diffusers_mixofshow.training.pictures import Photo


if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_ENCODED_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class CachedPhoto:
    """The latent distribution of a photo's crops; it is sampled anew at each step.

    Args:
        mean: Scaled as the denoiser expects, shape (crops, channels, height, width).
        deviation: Same shape.
        mask: Shape (crops, 1, height, width).
        captions: Row numbers of the photo's captions in the table of all captions.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    mask: torch.Tensor
    captions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one training step sees.

    Args:
        latents: z_0, shape (batch, channels, height, width).
        noise: epsilon, same shape.
        timesteps: Shape (batch,).
        mask: Weights of the loss, shape (batch, 1, height, width).
        captions: Row numbers of the distinct captions, each encoded once.
        caption_of: For every picture, its place in `captions`, shape (batch,).
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    mask: torch.Tensor
    captions: tuple[int, ...]
    caption_of: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(
            latents=self.latents.to(device),
            noise=self.noise.to(device),
            timesteps=self.timesteps.to(device),
            mask=self.mask.to(device),
            captions=self.captions,
            caption_of=self.caption_of.to(device),
        )


@torch.no_grad()
def cache_photos(
    photos: Sequence[Photo], table: Sequence[str], vae: AutoencoderKL, config: TrainingConfig
) -> list[CachedPhoto]:
    """Encode every crop of every photo once.

    Args:
        photos: What `read_photos` returned.
        table: All distinct captions.
        vae: The base model's autoencoder.
        config: Resolution, crops, seed and whether masks count.
    """
    rows = {caption: row for row, caption in enumerate(table)}
    generator = torch.Generator().manual_seed(config.seed)
    cached = []
    for photo in photos:
        crops = crops_of(
            photo,
            config.resolution,
            variants=config.crop_variants,
            center=config.center_crop,
            generator=generator,
            framing=config.framing,
            flip=config.random_flip,
        )
        mean, deviation = _encode(crops, vae)
        masks = torch.stack([crop.mask if config.masked_loss else crop.valid for crop in crops])
        cells = mask_on_latents(masks, *mean.shape[-2:])
        cached.append(
            CachedPhoto(
                mean=mean,
                deviation=deviation,
                mask=cells,
                captions=tuple(rows[caption] for caption in photo.captions),
            )
        )
    return cached


def random_batches(
    photos: Sequence[CachedPhoto],
    config: TrainingConfig,
    *,
    timesteps: int,
    generator: torch.Generator,
    empty_prompt: int | None = None,
) -> Iterator[Batch]:
    """Yield batches without end; of photos of one size, every one is seen before any is seen again.

    Args:
        photos: The cached photos.
        config: Batch size, captions per step, share of empty prompts and noise offset.
        timesteps: Number of the scheduler's training timesteps.
        generator: Draws everything, on the CPU, so that a seed means the same on every device.
        empty_prompt: Row number of the empty prompt in the table of all captions; None if captions are never left out.
    """
    size = config.train_batch_size
    distinct = min(config.captions_per_step or size, size)
    choices = _endless_choices(photos, distinct, generator)
    while True:
        chosen = next(choices)
        captions = [_pick(photo.captions, generator) for photo in chosen]
        if empty_prompt is not None:
            captions = _some_left_out(captions, config.proportion_empty_prompts, empty_prompt, generator)
        table = tuple(dict.fromkeys(captions))
        crops = [_sample_crop(chosen[place % distinct], generator) for place in range(size)]
        latents = torch.stack([latent for latent, _ in crops])
        channel_noise = torch.randn(*latents.shape[:2], 1, 1, generator=generator)
        yield Batch(
            latents=latents,
            noise=offset_noise(torch.randn(latents.shape, generator=generator), channel_noise, config.noise_offset),
            timesteps=spread_timesteps(size, timesteps, generator),
            mask=torch.stack([mask for _, mask in crops]),
            captions=table,
            caption_of=torch.tensor([table.index(captions[place % distinct]) for place in range(size)]),
        )


def spread_timesteps(count: int, timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """Draw timesteps that are uniform one by one but evenly spread over a batch, which steadies the loss.

    One lies in each of `count` equal parts of the range, as in arXiv:2107.00630, appendix I.1.

    Returns:
        Shape (count,), in [0, timesteps).
    """
    places = torch.randperm(count, generator=generator) + torch.rand(1, generator=generator)
    return (places / count * timesteps).long().clamp(max=timesteps - 1)


def _encode(crops: Sequence[Crop], vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the scaled latents on the CPU, each (crops, channels, height, width)."""
    means, deviations = [], []
    for part in torch.stack([crop.pixels for crop in crops]).split(_ENCODED_AT_ONCE):
        distribution = vae.encode(part.to(vae.device, vae.dtype)).latent_dist
        means.append(distribution.mean.float().cpu())
        deviations.append(distribution.std.float().cpu())
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scale = vae.config.scaling_factor
    return (torch.cat(means) - shift) * scale, torch.cat(deviations) * scale


def _sample_crop(photo: CachedPhoto, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    crop = _pick(range(len(photo.mean)), generator)
    latent = photo.mean[crop] + photo.deviation[crop] * torch.randn(photo.mean.shape[1:], generator=generator)
    return latent, photo.mask[crop]


def _endless_choices(
    photos: Sequence[CachedPhoto], count: int, generator: torch.Generator
) -> Iterator[list[CachedPhoto]]:
    """Some photos at a time, all of one size; a size's turn comes as often as it has photos."""
    by_size: dict[torch.Size, list[CachedPhoto]] = {}
    for photo in photos:
        by_size.setdefault(photo.mean.shape[1:], []).append(photo)
    orders = {size: _endless_order(len(group), generator) for size, group in by_size.items()}
    turns = [photo.mean.shape[1:] for photo in photos]
    while True:
        size = turns[0] if len(orders) == 1 else turns[_pick(range(len(turns)), generator)]
        yield [by_size[size][next(orders[size])] for _ in range(count)]


def _some_left_out(captions: list[int], share: float, empty: int, generator: torch.Generator) -> list[int]:
    """Put the empty prompt in place of a share of the captions, but never of the last one left."""
    left_out = (torch.rand(len(captions), generator=generator) < share).tolist()
    if all(left_out):
        left_out[0] = False
    return [empty if gone else caption for gone, caption in zip(left_out, captions, strict=True)]


def _endless_order(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _pick(options: Sequence[int], generator: torch.Generator) -> int:
    return options[int(torch.randint(len(options), (1,), generator=generator))]
