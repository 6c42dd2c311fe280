"""Make training pictures of a photo: crop it to a square or to the nearest bucket, or place it whole on black."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F


if TYPE_CHECKING:
    from diffusers_mixofshow.training.pictures import Photo

WIDEST = 2.0
"""Largest ratio of a bucket's sides; a longer photo is cropped to it."""

_SMALLEST_PLACED = 0.75
"""Least length of a placed photo's longer side, as a fraction of the square's side."""
_LEAST_FILLED = 0.75
"""Least area of a bucket, as a fraction of the square's area."""
_BUCKET_STEP = 64
"""Step of a bucket's sides in pixels: 64 pixels are one cell in the lowest resolution of Stable Diffusion's U-Net."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """One training picture of a photo.

    Args:
        pixels: In [-1, 1], shape (3, height, width).
        mask: Where the concept is, in [0, 1], shape (1, height, width); `valid` for a photo without a mask.
        valid: 1 where the photo is, 0 on the black around it, shape (1, height, width).
        top: Pixels of the scaled photo that were cut off above.
        left: Pixels cut off at the left.
        right: Pixels cut off at the right.
    """

    pixels: torch.Tensor
    mask: torch.Tensor
    valid: torch.Tensor
    top: int = 0
    left: int = 0
    right: int = 0


def crop_photo(photo: Photo, size: int | tuple[int, int], *, generator: torch.Generator | None = None) -> Crop:
    """Scale the photo until it covers the size and crop it.

    Args:
        photo: The photo.
        size: Width and height in pixels, or the side of a square.
        generator: Draws the crop's position; None crops at the centre.
    """
    width, height = (size, size) if isinstance(size, int) else size
    x, y = (0.5, 0.5) if generator is None else torch.rand(2, generator=generator).tolist()
    image = ImageOps.fit(photo.image, (width, height), Image.Resampling.LANCZOS, centering=(x, y))
    valid = torch.ones(1, height, width)
    if photo.known is not None:
        valid = _to_tensor(ImageOps.fit(photo.known, (width, height), Image.Resampling.BOX, centering=(x, y)))
    mask = valid
    if photo.mask is not None:
        mask = _to_tensor(ImageOps.fit(photo.mask, (width, height), Image.Resampling.BOX, centering=(x, y)))
    scale = max(width / photo.image.width, height / photo.image.height)
    across, down = photo.image.width * scale - width, photo.image.height * scale - height
    return Crop(
        pixels=_to_tensor(image) * 2 - 1,
        mask=mask,
        valid=valid,
        top=round(down * y),
        left=round(across * x),
        right=round(across * (1 - x)),
    )


def place_photo(photo: Photo, resolution: int, *, generator: torch.Generator) -> Crop:
    """Put the whole photo at a random place on a black square, as the authors' code does with persons.

    Args:
        photo: The photo; its longer side becomes 3/4 of the square's side or more.
        resolution: Side of the square in pixels.
        generator: Draws size and place.
    """
    shrink, x, y = torch.rand(3, generator=generator).tolist()
    longest = resolution * (_SMALLEST_PLACED + (1 - _SMALLEST_PLACED) * shrink)
    scale = longest / max(photo.image.size)
    width, height = (max(1, round(side * scale)) for side in photo.image.size)
    corner = (round((resolution - width) * x), round((resolution - height) * y))

    def place(image: Image.Image, resampling: Image.Resampling) -> torch.Tensor:
        square = Image.new(image.mode, (resolution, resolution))
        square.paste(image.resize((width, height), resampling), corner)
        return _to_tensor(square)

    valid = place(photo.known or Image.new("L", photo.image.size, 255), Image.Resampling.NEAREST)
    return Crop(
        pixels=place(photo.image, Image.Resampling.LANCZOS) * 2 - 1,
        mask=valid if photo.mask is None else place(photo.mask, Image.Resampling.BOX),
        valid=valid,
    )


def frame_photo(
    photo: Photo,
    resolution: int,
    *,
    variants: int,
    center: bool,
    generator: torch.Generator,
    framing: str = "crop",
    flip: bool = False,
) -> list[Crop]:
    """Make all training pictures of a photo; a photo of exactly the right shape gives a single crop.

    Args:
        photo: The photo.
        resolution: Side of the square in pixels; a bucket has at most the square's area.
        variants: How many crops or places are drawn.
        center: Whether to crop once at the centre instead.
        generator: Draws crops and places.
        framing: ``crop``, ``place`` or ``buckets``, see `TrainingConfig`.
        flip: Whether to add each picture mirrored.
    """
    if framing == "place":
        crops = [place_photo(photo, resolution, generator=generator) for _ in range(variants)]
    else:
        size = bucket_size(photo.image.size, resolution) if framing == "buckets" else (resolution, resolution)
        if center or photo.image.width * size[1] == photo.image.height * size[0]:
            crops = [crop_photo(photo, size)]
        else:
            crops = [crop_photo(photo, size, generator=generator) for _ in range(variants)]
    return [*crops, *map(mirror, crops)] if flip else crops


def mirror(crop: Crop) -> Crop:
    """Mirror a crop, as if the mirrored photo had been cropped."""
    return replace(
        crop,
        pixels=crop.pixels.flip(-1),
        mask=crop.mask.flip(-1),
        valid=crop.valid.flip(-1),
        left=crop.right,
        right=crop.left,
    )


def size_conditions(photo: Photo, crop: Crop) -> list[int]:
    """The size and crop conditions of Stable Diffusion XL (arXiv:2307.01952, section 2.2) for a training picture.

    Returns:
        Height and width of the original photo; rows and columns of the scaled photo that were cut off above and at the
        left (0 for a photo placed whole); height and width of the training picture.
    """
    width, height = photo.true_size
    return [height, width, crop.top, crop.left, *crop.pixels.shape[-2:]]


def bucket_size(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Width and height of the bucket whose shape is nearest to a photo's.

    The sides of a bucket are multiples of 64 pixels (below a resolution of 512, of an eighth of it, rounded down to a
    multiple of 8); it has 3/4 to all of the square's area, and no side longer than twice the other.

    Args:
        size: The photo's width and height.
        resolution: Side of the square with the largest area allowed.
    """
    step = min(_BUCKET_STEP, max(8, resolution // 64 * 8))
    sides = range(step, int(resolution * math.sqrt(WIDEST)) + 1, step)
    longest = [(side, int(min(resolution**2 / side, WIDEST * side)) // step * step) for side in sides]
    buckets = [*longest, *((height, width) for width, height in longest)]
    allowed = [
        (width, height)
        for width, height in buckets
        if width * height >= _LEAST_FILLED * resolution**2 and 1 / WIDEST <= width / height <= WIDEST
    ]
    shape = math.log(size[0] / size[1])
    return min(allowed, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - shape), -bucket[0] * bucket[1]))


def average_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Average a pixel mask over the cells of the latent grid.

    Args:
        mask: In [0, 1], shape (batch, 1, pixel height, pixel width).
        height: Of the latent grid, in cells.
        width: Of the latent grid, in cells.

    Returns:
        Shape (batch, 1, height, width). An empty mask, of a crop beside the concept, becomes 1 in every cell.
    """
    cells = F.adaptive_avg_pool2d(mask, (height, width))
    empty = cells.amax(dim=(1, 2, 3), keepdim=True) == 0
    return torch.where(empty, torch.ones_like(cells), cells)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """Values in [0, 1], shape (channels, height, width)."""
    channels = len(image.getbands())
    values = torch.from_numpy(np.array(image)).view(image.height, image.width, channels)
    return values.permute(2, 0, 1).float() / 255
