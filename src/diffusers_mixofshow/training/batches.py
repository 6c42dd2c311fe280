"""Encode photos to cached latents, and draw random training batches from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.framing import average_mask, frame_photo, size_conditions
from diffusers_mixofshow.training.latents import LatentEncoder
from diffusers_mixofshow.training.losses import offset_noise
from diffusers_mixofshow.training.pictures import Photo


if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True, kw_only=True)
class CachedPhoto:
    """The latent distribution of a photo's crops, from which every step samples.

    Args:
        mean: Scaled as the denoiser expects, shape (crops, channels, height, width).
        deviation: Same shape.
        mask: Weights of the loss, shape (crops, 1, height, width).
        subject: Share of each cell that shows the concept, same shape; None for a photo without a mask.
        sizes: SDXL's size conditions of each crop, see `size_conditions`, shape (crops, 6).
        captions: Row numbers of the photo's captions in the table of all captions.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    mask: torch.Tensor
    subject: torch.Tensor | None
    sizes: torch.Tensor
    captions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one training step sees.

    Args:
        latents: z_0, shape (batch, channels, height, width).
        noise: epsilon, same shape.
        timesteps: Shape (batch,).
        mask: Weights of the loss, shape (batch, 1, height, width).
        subject: Share of each cell that shows the concept, same shape; ones for a picture without a mask.
        has_subject: Whether a picture has a mask, shape (batch,).
        sizes: SDXL's size conditions of each picture, see `size_conditions`, shape (batch, 6).
        prior_pictures: How many of the pictures, the last ones, show the class instead of the concept.
        captions: Row numbers of the distinct captions, each encoded once.
        caption_of: For every picture, the index of its caption in `captions`, shape (batch,). Captions are in the
            order of their first picture: `SharedTexts.spread` relies on picture k reading caption k where there are
            as many captions as pictures.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    mask: torch.Tensor
    subject: torch.Tensor
    has_subject: torch.Tensor
    sizes: torch.Tensor
    prior_pictures: int
    captions: tuple[int, ...]
    caption_of: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved: dict[str, Any] = {
            each.name: value.to(device)
            for each in fields(self)
            if isinstance(value := getattr(self, each.name), torch.Tensor)
        }
        return replace(self, **moved)


def cache_photos(
    photos: Sequence[Photo], table: Sequence[str], vae: AutoencoderKL, config: TrainingConfig
) -> list[CachedPhoto]:
    """Encode every crop of every photo once, or read its latents from `latents_dir`.

    Args:
        photos: What `read_photos` returned.
        table: All distinct captions.
        vae: The base model's autoencoder.
        config: Resolution, crops, seed, whether masks weigh the loss, and where latents are kept.

    Raises:
        FileWriteError: If `latents_dir` cannot be written or is full.
    """
    encoder = LatentEncoder(vae, None if config.latents_dir is None else Path(config.latents_dir))
    rows = {caption: row for row, caption in enumerate(table)}
    generator = torch.Generator().manual_seed(config.seed)
    cached = []
    for photo in photos:
        crops = frame_photo(
            photo,
            config.resolution,
            variants=config.crop_variants,
            center=config.center_crop,
            generator=generator,
            framing=config.framing,
            flip=config.random_flip,
        )
        mean, deviation = encoder.encode(crops)
        cells, valid = (
            average_mask(torch.stack(masks), *mean.shape[-2:])
            for masks in ([crop.mask for crop in crops], [crop.valid for crop in crops])
        )
        cached.append(
            CachedPhoto(
                mean=mean,
                deviation=deviation,
                mask=cells if config.masked_loss else valid,
                subject=None if photo.mask is None else cells,
                sizes=torch.tensor([size_conditions(photo, crop) for crop in crops], dtype=torch.float32),
                captions=tuple(rows[caption] for caption in photo.captions),
            )
        )
    return cached


class RandomBatches:
    """Endless batches. All photos of one size are drawn once, in random order, before any is drawn again.

    Args:
        photos: The cached photos. A batch has photos of one size, drawn in proportion to the photos that have it.
        config: Batch size, captions per step, share of empty prompts and noise offset.
        timesteps: Number of the scheduler's training timesteps.
        generator: Draws everything, on the CPU, so that a seed gives the same batches on every device.
        prior: Cached pictures of the class; if there are any, half of each batch is of them.
        empty_prompt: Row number of the empty prompt in the table of all captions; None never leaves a caption out.
    """

    def __init__(
        self,
        photos: Sequence[CachedPhoto],
        config: TrainingConfig,
        *,
        timesteps: int,
        generator: torch.Generator,
        prior: Sequence[CachedPhoto] = (),
        empty_prompt: int | None = None,
    ) -> None:
        self.prior, self.config, self.timesteps, self.empty_prompt = prior, config, timesteps, empty_prompt
        self.generator = generator
        self._turns = ["x".join(map(str, photo.mean.shape[1:])) for photo in photos]
        self._of_size: dict[str, list[CachedPhoto]] = {size: [] for size in self._turns}
        for size, photo in zip(self._turns, photos, strict=True):
            self._of_size[size].append(photo)
        self._orders: dict[str, list[int]] = {name: [] for name in (*self._of_size, "prior")}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        size, generator = self.config.train_batch_size, self.generator
        distinct = min(self.config.captions_per_step or size, size)
        chosen = self._choose_photos(distinct)
        captions = self._leave_out_some([_pick(photo.captions, generator) for photo in chosen])
        shown = [chosen[place % distinct] for place in range(size)]
        told = [captions[place % distinct] for place in range(size)]
        if self.prior:
            of_class = [self.prior[self._draw_index("prior", len(self.prior))] for _ in range(size)]
            shown, told = [*shown, *of_class], [*told, *(photo.captions[0] for photo in of_class)]
        sampled = [_sample_crop(photo, generator) for photo in shown]
        latents = torch.stack([latent for latent, _ in sampled])
        crops = [(photo, crop) for photo, (_, crop) in zip(shown, sampled, strict=True)]
        channel_noise = torch.randn(*latents.shape[:2], 1, 1, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        drawn = [spread_timesteps(size, self.timesteps, generator) for _ in range(len(shown) // size)]
        table = tuple(dict.fromkeys(told))
        return Batch(
            latents=latents,
            noise=offset_noise(noise, channel_noise, self.config.noise_offset),
            timesteps=torch.cat(drawn),
            mask=torch.stack([photo.mask[crop] for photo, crop in crops]),
            subject=torch.stack([_subject_mask(photo, crop) for photo, crop in crops]),
            has_subject=torch.tensor([photo.subject is not None for photo in shown]),
            sizes=torch.stack([photo.sizes[crop] for photo, crop in crops]),
            prior_pictures=len(shown) - size,
            captions=table,
            caption_of=torch.tensor([table.index(row) for row in told]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Random state and position in the data."""
        orders = {name: list(order) for name, order in self._orders.items()}
        return {"generator": self.generator.get_state(), "orders": orders}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch that came next when `state_dict` was taken."""
        self.generator.set_state(state["generator"])
        self._orders = {name: list(order) for name, order in state["orders"].items()}

    def _choose_photos(self, count: int) -> list[CachedPhoto]:
        """Draw photos of one size."""
        turn = 0 if len(self._of_size) == 1 else _pick(range(len(self._turns)), self.generator)
        group = self._of_size[self._turns[turn]]
        return [group[self._draw_index(self._turns[turn], len(group))] for _ in range(count)]

    def _leave_out_some(self, captions: list[int]) -> list[int]:
        """Replace a share of the captions by the empty prompt, but never all of them."""
        if self.empty_prompt is None:
            return captions
        left_out = torch.rand(len(captions), generator=self.generator) < self.config.proportion_empty_prompts
        left_out[0] &= not left_out.all()
        return [self.empty_prompt if gone else row for gone, row in zip(left_out.tolist(), captions, strict=True)]

    def _draw_index(self, name: str, count: int) -> int:
        if not self._orders[name]:
            self._orders[name] = torch.randperm(count, generator=self.generator).tolist()
        return self._orders[name].pop(0)


def spread_timesteps(count: int, timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """Draw timesteps that are evenly spread over a batch, which lowers the variance of the loss.

    Each is uniform by itself; one lies in each of `count` equal parts of the range (arXiv:2107.00630, appendix I.1).

    Returns:
        Shape (count,), in [0, timesteps).
    """
    places = torch.randperm(count, generator=generator) + torch.rand(1, generator=generator)
    return (places / count * timesteps).long().clamp(max=timesteps - 1)


def _sample_crop(photo: CachedPhoto, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    crop = _pick(range(len(photo.mean)), generator)
    return photo.mean[crop] + photo.deviation[crop] * torch.randn(photo.mean.shape[1:], generator=generator), crop


def _subject_mask(photo: CachedPhoto, crop: int) -> torch.Tensor:
    return torch.ones_like(photo.mask[crop]) if photo.subject is None else photo.subject[crop]


def _pick(options: Sequence[int], generator: torch.Generator) -> int:
    return options[int(torch.randint(len(options), (1,), generator=generator))]
