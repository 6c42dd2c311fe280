"""What the attribute reader learns from: random things, also disturbed ones, and the labels of what they show."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL

from diffusers_mixofshow.toyland.reader import ReaderNetwork, list_labels, to_pixels
from diffusers_mixofshow.toyland.scenes import place_thing
from diffusers_mixofshow.toyland.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    CLASSES,
    MAIN_COLOURS,
    Scene,
    Thing,
    draw,
)


UNKNOWN = -1
"""Label of an attribute that a picture does not show; the loss leaves it out."""
_EXTRA_VALUES: dict[str, tuple[str, ...]] = {
    "ear_shape": ("antenna",),
    "ear_colour": ("cyan", "lime"),
    "eyes": ("three",),
    "eye_colour": ("red", "lime"),
    "pattern": ("checks",),
    "pattern_colour": ("cyan", "lime", "silver"),
    "belly_colour": ("cyan", "lime", "silver"),
    "hat_colour": ("cyan", "pink"),
    "collar_colour": ("cyan", "pink"),
    "flower_colour": ("cyan", "purple"),
    "cushion_colour": ("cyan",),
    "wings": ("wings",),
}
"""Hidden attribute to values that the base was not trained on; some concepts have them, and the reader knows them."""


def attribute_vocabulary() -> dict[str, tuple[str, ...]]:
    """Every attribute that the reader reads, with its values: class, background, main colour and hidden ones."""
    colours = [colour for names in MAIN_COLOURS.values() for colour in names]
    values: dict[str, list[str]] = {"class": [*CLASSES], "background": [*BACKGROUNDS], "colour": colours}
    for attributes in ATTRIBUTES.values():
        for name, choices in attributes.items():
            values.setdefault(name, []).extend(choices)
    for name, choices in _EXTRA_VALUES.items():
        values.setdefault(name, ["none"]).extend(choices)
    return {name: tuple(dict.fromkeys(choices)) for name, choices in values.items()}


def _random_thing(rng: random.Random) -> Thing:
    """A thing whose attributes have, in a third of the cases each, a value outside the base's world."""
    class_word = rng.choices(CLASSES, (8, 3, 2, 3, 2, 2))[0]
    colour = rng.choice(MAIN_COLOURS[class_word])
    attributes: dict[str, str] = {}
    for name, values in ATTRIBUTES[class_word].items():
        extra = _EXTRA_VALUES.get(name, ())
        choices = extra if extra and rng.random() < 0.33 else values
        attributes[name] = rng.choice([value for value in choices if name != "pattern_colour" or value != colour])
    if class_word == "critter" and rng.random() < 0.25:
        attributes["wings"] = "wings"
    if attributes.get("pattern") == "plain":
        del attributes["pattern_colour"]
    if attributes.get("hat") == "bare":
        del attributes["hat_colour"]
    return Thing(class_word=class_word, colour=colour, attributes=attributes)


@dataclass(frozen=True, kw_only=True)
class ReaderPool:
    """Pictures (n, 3, 64, 64) in uint8 and labels (n, attributes), in the vocabulary's order."""

    pixels: torch.Tensor
    labels: torch.Tensor


@torch.no_grad()
def soft_round_trip(vae: AutoencoderKL, pixels: torch.Tensor, seed: int) -> torch.Tensor:
    """Encode, disturb the latents by up to 0.7 of their deviation, decode: what imperfect samples look like."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[torch.Tensor] = []
    for part in pixels.split(128):
        latents = vae.encode(part.float() / 127.5 - 1).latent_dist.mode()
        strength = 0.7 * torch.rand(len(part), 1, 1, 1, generator=generator).square()
        decoded = vae.decode(latents + strength * torch.randn(latents.shape, generator=generator)).sample
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def reader_scenes(count: int, seed: int) -> list[Scene]:
    """Random scenes of one thing each, also with attribute values outside the base's world."""
    rng = random.Random(seed)
    return [
        Scene(
            background=rng.choice(BACKGROUNDS),
            things=(place_thing(_random_thing(rng), rng),),
            mirrored=rng.random() < 0.5,
        )
        for _ in range(count)
    ]


def scene_labels(scenes: Sequence[Scene]) -> torch.Tensor:
    """Labels (n, attributes) in the vocabulary's order; `UNKNOWN` throughout for scenes of several things."""
    vocabulary = attribute_vocabulary()
    labels = torch.full((len(scenes), len(vocabulary)), UNKNOWN)
    for row, scene in enumerate(scenes):
        known = list_labels(scene.things[0], scene.background) if len(scene.things) == 1 else {}
        for column, (name, values) in enumerate(vocabulary.items()):
            if name in known:
                labels[row, column] = values.index(known[name])
    return labels


def reader_pool(count: int, seed: int, vae: AutoencoderKL) -> ReaderPool:
    """Random pictures of one thing each, half of them after a disturbed round trip through the autoencoder."""
    scenes = reader_scenes(count, seed)
    images = [draw(scene).image for scene in scenes]
    pixels = ((to_pixels(images) + 1) * 127.5).round().to(torch.uint8)
    pixels[::2] = soft_round_trip(vae, pixels[::2], seed)
    return ReaderPool(pixels=pixels, labels=scene_labels(scenes))


def attribute_loss(scores: torch.Tensor, labels: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Mean cross entropy of scores (n, values of all attributes) over the labels (n, attributes) that are known."""
    losses = [
        torch.nn.functional.cross_entropy(part, labels[:, column], ignore_index=UNKNOWN, reduction="sum")
        for column, part in enumerate(scores.split(list(sizes), dim=1))
    ]
    return torch.stack(losses).sum() / (labels != UNKNOWN).sum().clamp(min=1)


class ReaderObjective(torch.nn.Module):
    """Mean cross entropy over the attributes that a picture shows."""

    def __init__(self, model: ReaderNetwork, sizes: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self._sizes = list(sizes)

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Loss of pictures (n, 3, 64, 64) and labels (n, attributes)."""
        pixels, labels = batch
        return attribute_loss(self.model(pixels), labels, self._sizes)
