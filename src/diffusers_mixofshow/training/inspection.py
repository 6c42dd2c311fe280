"""Checks that compare all photos: which are too small, and which show the same picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffusers_mixofshow.errors import list_first


if TYPE_CHECKING:
    from diffusers_mixofshow.training.pictures import Photo

MOST_ENLARGED = 2.0
"""A photo that training enlarges by more than this has too little detail to learn from."""

_NAMED = 3
"""How many photos a remark names before it says "and N more"."""
_THUMBNAIL = 16
_SAME_BELOW = 2.0
"""Two photos are the same picture if the mean difference of their thumbnails' values, of 255, is below this.

One picture saved in other sizes or formats stays below.
"""


def list_tiny(photos: Sequence[Photo], resolution: int, folder: Path) -> list[str]:
    """Write a remark on photos whose shorter side training enlarges too much; an empty list if there are none.

    Args:
        photos: All photos.
        resolution: Side of the training picture in pixels.
        folder: The folder that names are relative to.
    """
    found = [
        f"{photo.path.relative_to(folder).as_posix()} is {photo.image.width}x{photo.image.height} pixels "
        f"({resolution / min(photo.image.size):.1f} times)"
        for photo in photos
        if resolution > MOST_ENLARGED * min(photo.image.size)
    ]
    told = f"training enlarges {len(found)} of {len(photos)} photos more than {MOST_ENLARGED:g} times: "
    return [told + list_first(found, _NAMED)] if found else []


def list_duplicates(photos: Sequence[Photo], folder: Path) -> list[str]:
    """Write a remark on each photo that shows the same picture as an earlier one, in any size or format.

    Args:
        photos: All photos.
        folder: The folder that names are relative to.
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
