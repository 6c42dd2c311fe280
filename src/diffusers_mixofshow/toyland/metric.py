"""Toyland's metric model: pictures and texts as vectors of one space, in which different instances are far apart.

Its image tower is convolutional, as that learns in minutes what takes a vision transformer such as CLIP's hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from diffusers_mixofshow.conditioning.tokenize import tokenize_plain
from diffusers_mixofshow.pictures import read_image
from diffusers_mixofshow.toyland.reader import ReaderNetwork, to_pixels


if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


class MetricTowers(torch.nn.Module):
    """The metric model's own parts: a convolutional image tower, and a projection of the text tower's output.

    Args:
        text_width: Width of the text tower's pooled output.
        width: Width of the common space.
    """

    def __init__(self, text_width: int = 128, width: int = 96) -> None:
        super().__init__()
        self.image_tower = ReaderNetwork(width)
        self.text_projection = torch.nn.Linear(text_width, width, bias=False)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.66))

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit vectors (n, width) of pictures (n, 3, 64, 64) in [-1, 1]."""
        return torch.nn.functional.normalize(self.image_tower(pixels), dim=-1)

    def texts(self, pooled: torch.Tensor) -> torch.Tensor:
        """Unit vectors (n, width) of the text tower's pooled outputs (n, text_width)."""
        return torch.nn.functional.normalize(self.text_projection(pooled), dim=-1)


@dataclass(frozen=True, kw_only=True)
class MetricModel:
    """Toyland's counterpart of CLIP: pictures and texts as unit vectors of one space.

    Args:
        towers: Image tower and text projection.
        text_encoder: The pipeline's text encoder.
        tokenizer: The pipeline's tokenizer.
    """

    towers: MetricTowers
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit vectors (n, d) of pictures; those of another size are resized to 64 x 64."""
        pixels = to_pixels([_resize(image) for image in images])
        return torch.cat([self.towers.images(part) for part in pixels.split(128)])

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors (n, d) of texts."""
        pooled = self.text_encoder(input_ids=tokenize_plain(texts, self.tokenizer)).pooler_output
        return self.towers.texts(pooled)


def _resize(image: Image.Image) -> Image.Image:
    if image.size == (64, 64):
        return image
    resampling = Image.Resampling.BOX if image.width > 64 else Image.Resampling.BICUBIC
    return read_image(image, called="a picture").resize((64, 64), resampling)
