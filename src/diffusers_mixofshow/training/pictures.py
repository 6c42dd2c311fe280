"""Picture files of any common format to upright RGB, with what their alpha channel shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from diffusers_mixofshow.errors import TrainingDataError


HEIF_SUFFIXES = (".heic", ".heif")
"""Read by the optional package pillow-heif; Pillow cannot."""

PICTURE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".avif",
    *HEIF_SUFFIXES,
)
"""Endings of the files that count as pictures, in lower case."""

_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture file, read.

    Args:
        image: RGB, turned upright, on white where it was transparent.
        alpha: Opacity as mode L, as large as the image; None if the file has none or is opaque everywhere.
        frames: How many frames the file has; `image` is the first.
    """

    image: Image.Image
    alpha: Image.Image | None
    frames: int = 1


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


def is_picture(path: Path) -> bool:
    """Whether the file's ending is a picture's."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def read_picture(path: Path, *, called: str) -> Picture:
    """Read a picture of any mode: palettes, greyscale, 16 bits, CMYK and alpha included.

    Args:
        path: The file.
        called: How errors name it.

    Raises:
        TrainingDataError: If it cannot be read, or needs a package that is not installed.
    """
    try:
        with _open(path, called) as opened:
            # Phones put other pictures (depth, a preview) behind the photo of an MPO.
            frames = 1 if opened.format == "MPO" else int(getattr(opened, "n_frames", 1))
            upright = _to_eight_bits(ImageOps.exif_transpose(opened))
            return Picture(image=_on_white(upright), alpha=_alpha(upright), frames=frames)
    except _UNREADABLE as error:
        if isinstance(error, TrainingDataError):
            raise
        raise TrainingDataError(f"{called} is no readable picture ({error})") from error


def _open(path: Path, called: str) -> Image.Image:
    if path.suffix.lower() not in HEIF_SUFFIXES:
        return Image.open(path)
    try:
        import pillow_heif
    except ImportError as error:
        raise TrainingDataError(
            f"{called} is HEIC, which needs pillow-heif (pip install 'diffusers-mixofshow[heic]'); or save it as JPEG"
        ) from error
    opened: Image.Image = pillow_heif.open_heif(path).to_pillow()
    return opened


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits instead of cutting them off."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        return Image.fromarray(np.uint8(np.clip(values / (257 if values.max() > 255 else 1), 0, 255)))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _alpha(image: Image.Image) -> Image.Image | None:
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha
