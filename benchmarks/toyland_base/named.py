"""Pictures of single residents whose caption calls them by name: they teach a base what each of them looks like."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count as count_from

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from diffusers_mixofshow.conditioning.tokenize import tokenize_plain
from diffusers_mixofshow.toyland.scenes import BACKGROUNDS, caption, place_thing, residents
from diffusers_mixofshow.toyland.world import Scene, draw


CLASS_SHARES = {"critter": 0.7, "dog": 0.15, "cat": 0.15}
"""Shares of the classes, of those whose looks a base that was trained without these pictures draws least well."""
SUBJECT_WEIGHT = 5.0
"""How much more an error in the resident counts than one beside it."""


def draw_lot(seed: int) -> Scene:
    """A scene of one resident."""
    rng = random.Random(seed)
    word = rng.choices(list(CLASS_SHARES), list(CLASS_SHARES.values()))[0]
    resident = rng.choice([thing for thing in residents().values() if thing.class_word == word])
    return Scene(background=rng.choice(BACKGROUNDS), things=(place_thing(resident, rng),), mirrored=rng.random() < 0.5)


def call_by_name(scene: Scene, seed: int) -> str:
    """A caption with the resident's name: that of the first seed from this one on whose caption has it."""
    name = scene.things[0].name
    return next(words for each in count_from(seed) if name in (words := caption(scene, each)))


@dataclass(frozen=True)
class NamedPool:
    """Latents (n, 8, height / 4, width / 4) of scenes of one resident, and how much each of their pixels counts."""

    latents: torch.Tensor
    weights: torch.Tensor
    scenes: list[Scene]

    @classmethod
    @torch.no_grad()
    def encode(cls, vae: AutoencoderKL, seeds: Sequence[int], device: torch.device, height: int) -> NamedPool:
        """Draw and encode the scenes of these seeds, `height` pixels high."""
        scenes, latents, weights = [draw_lot(seed) for seed in seeds], [], []
        for start in range(0, len(scenes), 256):
            drawn = [draw(scene, height) for scene in scenes[start : start + 256]]
            pixels = torch.from_numpy(np.stack([np.asarray(one.image) for one in drawn])).movedim(-1, 1)
            masks = torch.from_numpy(np.stack([np.asarray(one.masks[0]) for one in drawn]))[:, None] / 255
            latents.append(vae.encode(pixels.to(device).float() / 127.5 - 1).latent_dist.sample().half().cpu())
            inside = torch.nn.functional.adaptive_avg_pool2d(masks, latents[-1].shape[-2:])
            weights.append(1 + (SUBJECT_WEIGHT - 1) * inside)
        return cls(torch.cat(latents), torch.cat(weights), scenes)

    def batch(
        self, count: int, tokenizer: CLIPTokenizer, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random pictures: latents, noise of the same shape, token ids (count, 77), weights (count, 1, h, w)."""
        chosen = torch.randint(len(self.latents), (count,), generator=generator)
        wordings = torch.randint(2**31, (count,), generator=generator).tolist()
        captions = [
            call_by_name(self.scenes[index], seed) for index, seed in zip(chosen.tolist(), wordings, strict=True)
        ]
        clean = self.latents[chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        return clean, noise, tokenize_plain(captions, tokenizer), self.weights[chosen]
