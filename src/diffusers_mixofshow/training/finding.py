"""Where in a picture something is that a word names, told by CLIPSeg (arXiv:2112.10003)."""

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
"""CLIPSeg's own weights, those with the finer maps."""

_PATCHES = 22
"""Along each side of a picture, as these weights were trained: 352 pixels in patches of 16."""
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the pictures that they were trained on, red, green and blue from 0 to 1."""


class Finder:
    """Looks for what a word names.

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
            HubError: If only the Hub has it, and that cannot be reached.
            ConfigurationError: If there is none, or what is there is something else.
        """
        from transformers import CLIPSegForImageSegmentation

        expected = f"a Hub id or a folder of a CLIPSeg with its tokenizer, such as {DEFAULT_FINDER!r}"
        return cls(
            *load_clip_model(name, CLIPSegForImageSegmentation, called="model that finds subjects", expected=expected)
        )

    @torch.no_grad()
    def likelihood(self, image: Image.Image, class_word: str) -> np.ndarray:
        """How likely each part of a picture belongs to what the word names.

        Args:
            image: RGB, any shape.
            class_word: Such as "dog".

        Returns:
            Numbers from 0 to 1, float64, of shape (side, side): the whole picture, made square.
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
