"""What a look over all photos shows: which are too small, and which are the same picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image


if TYPE_CHECKING:
    from diffusers_mixofshow.training.pictures import Photo

MOST_ENLARGED = 2.0
"""A photo that training enlarges by more than this has too little detail to learn from."""

_NAMED = 3
_THUMBNAIL = 16
_SAME_BELOW = 2.0
"""Mean difference of two thumbnails' values, of 255: files of one picture in several sizes or formats stay below."""


def tiny(photos: Sequence[Photo], resolution: int, folder: Path) -> list[str]:
    """Count the photos whose shorter side training enlarges too much, and name the first few; empty if there is none.

    Args:
        photos: All photos.
        resolution: Side of the training picture in pixels.
        folder: Where names start.
    """
    found = [
        f"{photo.path.relative_to(folder).as_posix()} is {photo.image.width}x{photo.image.height} pixels "
        f"({resolution / min(photo.image.size):.1f} times)"
        for photo in photos
        if resolution > MOST_ENLARGED * min(photo.image.size)
    ]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    told = f"training enlarges {len(found)} of {len(photos)} photos more than {MOST_ENLARGED:g} times: "
    return [told + ", ".join(found[:_NAMED]) + more] if found else []


def duplicates(photos: Sequence[Photo], folder: Path) -> list[str]:
    """Name the photos that show the same picture as an earlier one, be it in another size or format.

    Args:
        photos: All photos.
        folder: Where names start.
    """
    thumbnails = [_thumbnail(photo.image) for photo in photos]
    found = []
    for later, photo in enumerate(photos):
        for earlier in range(later):
            if np.abs(thumbnails[later] - thumbnails[earlier]).mean() < _SAME_BELOW:
                names = (each.path.relative_to(folder).as_posix() for each in (photo, photos[earlier]))
                found.append("{} shows the same as {}, so it counts twice".format(*names))
                break
    return found


def _thumbnail(image: Image.Image) -> np.ndarray:
    """Shape (16, 16, 3), in [0, 255]."""
    return np.asarray(image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX), dtype=np.float32)
