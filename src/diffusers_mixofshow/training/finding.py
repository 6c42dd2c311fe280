"""Find what a word names in a picture, with CLIPSeg (arXiv:2112.10003)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from PIL import Image

from diffusers_mixofshow.conditioning.tokenize import tokenize_plain
from diffusers_mixofshow.edlora.models import load_clip_model


if TYPE_CHECKING:
    from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

DEFAULT_FINDER = "CIDAS/clipseg-rd64-refined"
"""The CLIPSeg authors' weights with refined maps."""

_PATCHES = 22
"""Patches along each side of a picture in CLIPSeg's training: 352 pixels in patches of 16."""
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""CLIPSeg's normalisation of red, green and blue in [0, 1]."""


class Finder:
    """A CLIPSeg that finds what a word names.

    Args:
        model: A CLIPSeg, in evaluation mode.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: CLIPSegForImageSegmentation, tokenizer: CLIPTokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, name: str) -> Self:
        """Load a CLIPSeg from the Hub or a folder, onto the GPU where there is one.

        Raises:
            HubError: If it is not on this disk and the Hub cannot be reached.
            ConfigurationError: If there is no such model, or it is no CLIPSeg.
        """
        from transformers import CLIPSegForImageSegmentation

        expected = f"a Hub id or a folder of a CLIPSeg with its tokenizer, such as {DEFAULT_FINDER!r}"
        return cls(
            *load_clip_model(name, CLIPSegForImageSegmentation, called="model that finds subjects", expected=expected)
        )

    @torch.no_grad()
    def likelihood(self, image: Image.Image, class_word: str) -> np.ndarray:
        """Estimate for each part of a picture how likely it shows what the word names.

        Args:
            image: RGB, any shape.
            class_word: Such as "dog".

        Returns:
            Numbers from 0 to 1, float64, shape (side, side); they cover the whole picture, stretched to a square.
        """
        pixels, ids = self._pixels(image), tokenize_plain([f"a photo of a {class_word}."], self._tokenizer)
        device = self._model.device
        logits = self._model(pixel_values=pixels.to(device), input_ids=ids.to(device)).logits
        return logits[0].sigmoid().double().cpu().numpy()

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        """The picture as CLIPSeg was trained on it, shape (1, 3, side, side), float32."""
        side = _PATCHES * self._model.config.vision_config.patch_size
        square = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        colours = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1)  # -> (3, side, side)
        return ((colours - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_DEVIATION)[:, None, None])[None]
