"""Photos as they are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_mixofshow.errors import PictureError
from diffusers_mixofshow.pictures import Picture, read_picture


__all__ = ["Photo", "read_picture", "read_visible"]

_BARELY_OPAQUE = 2
"""Of 255: what is no more opaque than this cannot be seen; alpha of 0 and 1 is most often meant as no and yes."""


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One photo as the user gave it.

    Args:
        path: Where it was read.
        image: RGB, turned upright.
        captions: Texts that describe it; each names the concept by its placeholder.
        mask: Where the concept is (mode L, white), as large as the image; None if there is no mask.
        known: Where the loss may look (mode L, white), as large as the image; None: everywhere.
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
        """Width and height in pixels as the photo was taken, which say how sharp it is."""
        return self.original_size or self.image.size


def read_visible(path: Path, *, called: str) -> Picture:
    """Read a picture that is to be learnt from, see `read_picture`.

    Raises:
        PictureError: If it cannot be read, or next to nothing of it can be seen, so that it would be a white sheet.
    """
    picture = read_picture(path, called=called)
    highest = 255 if picture.alpha is None else int(np.asarray(picture.alpha).max())
    if 0 < highest <= _BARELY_OPAQUE:
        raise PictureError(
            f"{called} would be a white sheet: it has an alpha of 0 and {highest}; save it with 0 and 255, or without"
        )
    return picture
