"""Photos as they are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffusers_mixofshow.pictures import PICTURE_SUFFIXES, is_picture, read_picture


__all__ = ["PICTURE_SUFFIXES", "Photo", "is_picture", "read_picture"]


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One photo as the user gave it.

    Args:
        path: Where it was read.
        image: RGB, turned upright.
        captions: Texts that describe it; each names the concept by its placeholder.
        mask: Where the concept is (mode L, white), as large as the image; None if there is no mask.
    """

    path: Path
    image: Image.Image
    captions: tuple[str, ...]
    mask: Image.Image | None
