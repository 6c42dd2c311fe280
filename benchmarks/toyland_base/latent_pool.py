"""Pictures of the training world that were drawn and encoded in advance, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from diffusers_mixofshow.conditioning.tokenize import tokenize_plain
from diffusers_mixofshow.toyland.scenes import caption, random_scene
from diffusers_mixofshow.toyland.world import HEIGHT, Scene

from .autoencoder import render_pixels


@dataclass(frozen=True)
class LatentPool:
    """Latents (n, 8, height / 4, width / 4) of scenes, in half precision on the CPU."""

    latents: torch.Tensor
    scenes: list[Scene]

    @classmethod
    @torch.no_grad()
    def encode(
        cls,
        vae: AutoencoderKL,
        seeds: Sequence[int],
        things: int | None,
        device: torch.device,
        height: int = HEIGHT,
        enlarged_to: int | None = None,
    ) -> LatentPool:
        """Draw and encode the scenes of these seeds; the other arguments are those of `render_pixels`."""
        parts = []
        for start in range(0, len(seeds), 256):
            pixels = render_pixels(seeds[start : start + 256], things, height, enlarged_to)
            latents = vae.encode(pixels.to(device).float() / 127.5 - 1).latent_dist
            parts.append(latents.sample().half().cpu())
        return cls(torch.cat(parts), [random_scene(seed, things=things) for seed in seeds])

    def batch(
        self, count: int, tokenizer: CLIPTokenizer, generator: torch.Generator, *, uncaptioned: float = 0.1
    ) -> tuple[list[Scene], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random pictures.

        Args:
            count: How many.
            tokenizer: Of the captions.
            generator: Decides everything.
            uncaptioned: Share of pictures whose caption is empty.

        Returns:
            Their scenes, latents, noise of the same shape, and the token ids (count, 77) of a caption each.
        """
        chosen = torch.randint(len(self.latents), (count,), generator=generator)
        wordings = torch.randint(2**31, (count,), generator=generator).tolist()
        dropped = (torch.rand(count, generator=generator) < uncaptioned).tolist()
        scenes = [self.scenes[index] for index in chosen.tolist()]
        captions = [
            "" if drop else caption(scene, seed) for scene, seed, drop in zip(scenes, wordings, dropped, strict=True)
        ]
        clean = self.latents[chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        return scenes, clean, noise, tokenize_plain(captions, tokenizer)
