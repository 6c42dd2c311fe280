"""The attribute reader: hidden attributes read off a picture, an objective measure of identity."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_mixofshow.errors import ConceptError
from diffusers_mixofshow.pictures import read_image
from diffusers_mixofshow.toyland.autoencoder import to_pixels
from diffusers_mixofshow.toyland.scenes import place_thing
from diffusers_mixofshow.toyland.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    CLASSES,
    EXTRA_VALUES,
    MAIN_COLOURS,
    Scene,
    Thing,
    draw,
)


UNKNOWN = -1
"""Label of an attribute that a picture does not show; the loss leaves it out."""


def attribute_vocabulary() -> dict[str, tuple[str, ...]]:
    """Every attribute that the reader reads, with its values: class, background, main colour and hidden ones."""
    colours = [colour for names in MAIN_COLOURS.values() for colour in names]
    values: dict[str, list[str]] = {"class": [*CLASSES], "background": [*BACKGROUNDS], "colour": colours}
    for attributes in ATTRIBUTES.values():
        for name, choices in attributes.items():
            values.setdefault(name, []).extend(choices)
    for name, choices in EXTRA_VALUES.items():
        values.setdefault(name, ["none"]).extend(choices)
    return {name: tuple(dict.fromkeys(choices)) for name, choices in values.items()}


def labels_of(thing: Thing, background: str) -> dict[str, str]:
    """What the reader should say about a picture of `thing` at `background`."""
    labels = {"class": thing.class_word, "background": background, "colour": thing.colour, **thing.attributes}
    if thing.class_word == "critter":
        labels.setdefault("wings", "none")
    return labels


def _random_thing(rng: random.Random) -> Thing:
    """A thing whose attributes have, in a third of the cases each, a value outside the base's world."""
    class_word = rng.choices(CLASSES, (8, 3, 2, 3, 2, 2))[0]
    colour = rng.choice(MAIN_COLOURS[class_word])
    attributes: dict[str, str] = {}
    for name, values in ATTRIBUTES[class_word].items():
        extra = EXTRA_VALUES.get(name, ())
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
        known = labels_of(scene.things[0], scene.background) if len(scene.things) == 1 else {}
        for column, (name, values) in enumerate(vocabulary.items()):
            if name in known:
                labels[row, column] = values.index(known[name])
    return labels


def reader_pool(count: int, seed: int, vae: AutoencoderKL | None = None) -> ReaderPool:
    """Random pictures of one thing each; with `vae`, half of them after a disturbed round trip."""
    scenes = reader_scenes(count, seed)
    images = [draw(scene).image for scene in scenes]
    pixels = ((to_pixels(images) + 1) * 127.5).round().to(torch.uint8)
    if vae is not None:
        pixels[::2] = soft_round_trip(vae, pixels[::2], seed)
    return ReaderPool(pixels=pixels, labels=scene_labels(scenes))


class ReaderNetwork(torch.nn.Module):
    """Six convolutions, mean and maximum over the picture, one linear head for all attributes.

    Args:
        outputs: Number of values of all attributes together.
        widths: Channels of the convolutions; every second one halves the resolution.
    """

    def __init__(self, outputs: int, widths: Sequence[int] = (32, 48, 64, 96, 128, 128)) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        before = 3
        for index, width in enumerate(widths):
            layers += [
                torch.nn.Conv2d(before, width, 5 if index == 0 else 3, 2 - index % 2, 2 if index == 0 else 1),
                torch.nn.GroupNorm(8, width),
                torch.nn.SiLU(),
            ]
            before = width
        self.body = torch.nn.Sequential(*layers)
        self.head = torch.nn.Linear(2 * before, outputs)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scores (n, outputs) of pictures (n, 3, 64, 64) in [-1, 1]."""
        features = self.body(pixels)
        return self.head(torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1))


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


class AttributeReader:
    """Reads attributes off whole pictures of 64 x 64 with one large thing.

    Args:
        network: The trained network.
        vocabulary: Values of every attribute, in the order of the network's outputs.
    """

    def __init__(self, network: ReaderNetwork, vocabulary: Mapping[str, Sequence[str]]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.vocabulary = {name: tuple(values) for name, values in vocabulary.items()}

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> AttributeReader:
        """Load a reader that `save_pretrained` wrote."""
        vocabulary = json.loads((Path(folder) / "vocabulary.json").read_text(encoding="utf-8"))
        network = ReaderNetwork(sum(len(values) for values in vocabulary.values()))
        state = load_file(Path(folder) / "model.safetensors")
        network.load_state_dict({name: value.float() for name, value in state.items()})
        return cls(network, vocabulary)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``model.safetensors`` in half precision and ``vocabulary.json``."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {name: value.half().contiguous() for name, value in self.network.state_dict().items()}
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "vocabulary.json").write_text(json.dumps(self.vocabulary, indent=1), encoding="utf-8")

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """Probabilities (n, values) of every attribute, in the order of ``vocabulary``.

        An attribute that the picture's class does not have gets probabilities too; they mean nothing.
        """
        pixels = to_pixels([_square(image) for image in images])
        scores = torch.cat([self.network(part) for part in pixels.split(128)])
        parts = scores.split([len(values) for values in self.vocabulary.values()], dim=1)
        return {name: part.softmax(dim=1) for name, part in zip(self.vocabulary, parts, strict=True)}

    def agreement(self, images: Sequence[Image.Image], attributes: Mapping[str, str]) -> torch.Tensor:
        """Fraction (n,) of the named attributes that are read off each picture with the wanted value.

        Args:
            attributes: Wanted value of every attribute that counts, e.g. ``{"colour": "red", "hat": "crown"}``.

        Raises:
            ConceptError: If an attribute or value is not in the vocabulary.
        """
        known = self.vocabulary
        unknown = [f"{name}={value}" for name, value in attributes.items() if value not in known.get(name, ())]
        if unknown or not attributes:
            raise ConceptError(
                f"The reader does not know {', '.join(unknown) or 'an empty list of attributes'}. "
                f"It reads: {', '.join(self.vocabulary)}."
            )
        found = self.read(images)
        right = [found[name].argmax(dim=1) == self.vocabulary[name].index(value) for name, value in attributes.items()]
        return torch.stack(right, dim=1).float().mean(dim=1)


def _square(image: Image.Image) -> Image.Image:
    if image.size == (64, 64):
        return image
    return read_image(image, called="a picture").resize((64, 64), Image.Resampling.BICUBIC)
