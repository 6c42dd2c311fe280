"""The attribute reader: a network that reads hidden attributes in a picture, an objective measure of identity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_mixofshow.errors import ConceptError
from diffusers_mixofshow.pictures import read_image
from diffusers_mixofshow.toyland.world import Thing


def list_labels(thing: Thing, background: str) -> dict[str, str]:
    """Attribute name to the value that the reader should read in a picture of `thing` at `background`."""
    labels = {"class": thing.class_word, "background": background, "colour": thing.colour, **thing.attributes}
    if thing.class_word == "critter":
        labels.setdefault("wings", "none")
    return labels


def to_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Convert pictures of one size to a tensor (n, 3, height, width) in [-1, 1]."""
    arrays = np.stack([np.asarray(read_image(image, called="a picture")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


class ReaderNetwork(torch.nn.Module):
    """Six convolutions, mean and maximum over the picture, and one linear head for all attributes.

    Args:
        outputs: Total number of values over all attributes.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        before = 3
        for index, width in enumerate((32, 48, 64, 96, 128, 128)):  # every second one halves the resolution
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


class AttributeReader:
    """Reads attributes in pictures of one large thing; the network sees them at 64 x 64 pixels.

    Args:
        network: The trained network.
        vocabulary: Values of every attribute, in the order of the network's outputs.
    """

    def __init__(self, network: ReaderNetwork, vocabulary: Mapping[str, Sequence[str]]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.vocabulary = {name: tuple(values) for name, values in vocabulary.items()}

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> AttributeReader:
        """Load a reader from a folder with ``model.safetensors`` and ``vocabulary.json``."""
        vocabulary = json.loads((Path(folder) / "vocabulary.json").read_text(encoding="utf-8"))
        network = ReaderNetwork(sum(len(values) for values in vocabulary.values()))
        state = load_file(Path(folder) / "model.safetensors")
        network.load_state_dict({name: value.float() for name, value in state.items()})
        return cls(network, vocabulary)

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """Probabilities (n, values) of every attribute, in the order of ``vocabulary``.

        Probabilities of attributes that the picture's class does not have are meaningless.
        """
        pixels = to_pixels([_resize(image) for image in images])
        scores = torch.cat([self.network(part) for part in pixels.split(128)])
        parts = scores.split([len(values) for values in self.vocabulary.values()], dim=1)
        return {name: part.softmax(dim=1) for name, part in zip(self.vocabulary, parts, strict=True)}

    def agreement(self, images: Sequence[Image.Image], attributes: Mapping[str, str]) -> torch.Tensor:
        """Fraction (n,) of the given attributes that are read in each picture with the given value.

        Args:
            images: Pictures.
            attributes: Attribute name to the expected value, e.g. ``{"colour": "red", "hat": "crown"}``.

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


def _resize(image: Image.Image) -> Image.Image:
    if image.size == (64, 64):
        return image
    return read_image(image, called="a picture").resize((64, 64), Image.Resampling.BICUBIC)
