"""A CLIP model as the judge of pictures of the real world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image

from diffusers_mixofshow.conditioning.tokenize import tokenize_plain
from diffusers_mixofshow.edlora.models import load_clip_model
from diffusers_mixofshow.pictures import read_image


if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

DEFAULT_CLIP = "openai/clip-vit-base-patch32"
"""The metric model of the Mix-of-Show paper."""

_PREFIX = "A photo depicts "
"""Prefix of every text in CLIPScore (arXiv:2104.08718)."""

_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation of red, green and blue in [0, 1]."""

_BATCH = 32


class ClipJudge:
    """Judges pictures with CLIP, which reads no attributes; see `identity.Judge`.

    Args:
        model: CLIP with both towers, in evaluation mode.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, name: str) -> Self:
        """Load a CLIP from the Hub or a folder, onto the GPU where there is one.

        Raises:
            HubError: If it is not on this disk and the Hub cannot be reached.
            ConfigurationError: If there is no such model, or it is no CLIP.
        """
        from transformers import CLIPModel

        expected = f"a Hub id or a folder of a CLIP model with its tokenizer, such as {DEFAULT_CLIP!r}"
        return cls(*load_clip_model(name, CLIPModel, called="metric model", expected=expected))

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit vectors of pictures, shape (n, d), float32 on the CPU, computed on their middle squares."""
        side = self._model.config.vision_config.image_size
        parts = []
        for start in range(0, len(images), _BATCH):
            pixels = torch.stack([_pixels(image, side) for image in images[start : start + _BATCH]])
            parts.append(image_embeddings(self._model, pixels.to(self._model.device)).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors of texts, shape (n, d), float32 on the CPU."""
        token_ids = tokenize_plain([_PREFIX + text for text in texts], self._tokenizer)
        return text_embeddings(self._model, token_ids.to(self._model.device)).cpu()

    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """Return an empty dictionary for each picture: CLIP reads no attributes."""
        return [{} for _ in images]


def image_embeddings(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """Unit vectors (n, d) of pictures (n, 3, side, side), normalised as in the model's training."""
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    return torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)


def text_embeddings(model: CLIPModel, token_ids: torch.Tensor) -> torch.Tensor:
    """Unit vectors (n, d) of token ids."""
    pooled = model.text_model(input_ids=token_ids).pooler_output
    return torch.nn.functional.normalize(model.text_projection(pooled), dim=-1)


def _pixels(image: Image.Image, side: int) -> torch.Tensor:
    """A picture as CLIP's own processor prepares it: resized to its shorter side, its middle, normalised.

    To the pixel, so that scores are those that others get: whole pixels are cut off, after resizing.

    Returns:
        Shape (3, side, side), float32.
    """
    picture = read_image(image, called="a picture")
    shorter = min(picture.size)
    width, height = (int(side * length / shorter) for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    square = resized.crop((left, top, left + side, top + side))
    values: Any = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    colours = values.view(side, side, 3).permute(2, 0, 1).float() / 255  # -> (3, side, side)
    return (colours - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_DEVIATION)[:, None, None]
