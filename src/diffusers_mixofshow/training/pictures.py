"""Photos to train on, with captions and masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_mixofshow.errors import PictureError
from diffusers_mixofshow.pictures import Picture, read_picture


_BARELY_OPAQUE = 2
"""Alpha up to this, of 255, cannot be seen; a channel of 0 and 1 most often is a mask saved in the wrong range."""


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One photo to train on.

    Args:
        path: Where it was read.
        image: RGB, turned upright.
        captions: Texts that describe it; each names the concept by its placeholder.
        mask: Where the concept is (mode L, white), as large as the image; None if there is no mask.
        known: Where the loss counts (mode L, white), as large as the image; None: everywhere.
        original_size: Width and height in pixels before it was scaled down for training; None: the image's.
    """

    path: Path
    image: Image.Image
    captions: tuple[str, ...]
    mask: Image.Image | None
    known: Image.Image | None = None
    original_size: tuple[int, int] | None = None

    @property
    def true_size(self) -> tuple[int, int]:
        """Width and height in pixels of the original photo; SDXL is trained with them as a condition."""
        return self.original_size or self.image.size


def read_visible(path: Path, *, called: str) -> Picture:
    """Read a picture to train on, see `read_picture`.

    Raises:
        PictureError: If it cannot be read, or is so transparent that it would be white.
    """
    picture = read_picture(path, called=called)
    highest = 255 if picture.alpha is None else int(np.asarray(picture.alpha).max())
    if 0 < highest <= _BARELY_OPAQUE:
        raise PictureError(
            f"{called} would be a white sheet: it has an alpha of 0 and {highest}; save it with 0 and 255, or without"
        )
    return picture
