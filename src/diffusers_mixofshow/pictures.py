"""Pictures of any kind, from a file or in memory, to upright 8-bit RGB, with what their alpha channel shows."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusers_mixofshow.errors import PictureError, warn


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


class FileContent(io.BytesIO):
    """What a file held when it was read, for those who look at it and tell afterwards which one that was."""

    def __init__(self, path: Path) -> None:
        """Read the file."""
        super().__init__(path.read_bytes())
        self.path = path

    @property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.getbuffer()).hexdigest()


Source = Path | BinaryIO | Image.Image
"""A picture's file, its bytes as an open file, or the picture itself."""

_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
_BITS, _PHOTOMETRIC, _FORMAT = 258, 262, 339
"""TIFF's tags."""
_WHITE_IS_ZERO, _SIGNED = 0, 2
"""TIFF's names of the kind of a picture, and of its numbers."""
_STEP = 1 / 255
"""The least that 8 bits can show."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture, read.

    Args:
        image: RGB, turned upright, on white where it was transparent.
        alpha: Opacity as mode L, as large as the image; None if there is none or it is opaque everywhere.
        remarks: Sentences about what is unusual in the file, to be told to the user.
    """

    image: Image.Image
    alpha: Image.Image | None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A picture as it was stored.

    Args:
        image: Of any mode, turned upright.
        deep: Its values in [0, 1], shape (height, width), where they have more than 8 bits; else None.
        remarks: Sentences about what is unusual in the file, to be told to the user.
    """

    image: Image.Image
    deep: np.ndarray | None
    remarks: tuple[str, ...] = ()


def is_picture(path: Path) -> bool:
    """Whether the file's ending is a picture's."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def read_image(source: Source, *, called: str) -> Image.Image:
    """Read a picture as upright RGB, and warn of what is odd about it; see `read_picture`."""
    picture = read_picture(source, called=called)
    for remark in picture.remarks:
        warn(remark)
    return picture.image


def read_picture(source: Source, *, called: str) -> Picture:
    """Read a picture of any mode: palettes, greyscale, 16 and 32 bits, floats from 0 to 1, CMYK and alpha included.

    More than 8 bits are scaled by what the mode can hold, never by the brightest pixel.

    Args:
        source: A file, or a picture in memory.
        called: How errors and remarks name it.

    Raises:
        PictureError: If it cannot be read, needs a package that is not installed, or can be understood in two ways.
    """
    opened = open_upright(source, called=called)
    if opened.deep is None:
        return Picture(image=_on_white(opened.image), alpha=_alpha(opened.image), remarks=opened.remarks)
    dark = _darkness(opened.deep, opened.image.mode, called)
    image = Image.fromarray(np.rint(opened.deep * 255).astype(np.uint8)).convert("RGB")
    return Picture(image=image, alpha=None, remarks=(*opened.remarks, *dark))


def open_upright(source: Source, *, called: str) -> Opened:
    """Open a picture and turn it upright as its EXIF data say.

    Args:
        source: A file, or a picture in memory.
        called: How errors and remarks name it.

    Raises:
        PictureError: See `read_picture`.
    """
    try:
        if isinstance(source, Image.Image):
            return _upright(source, called)
        with _open(source, called) as opened:
            # Phones put other pictures (depth, a preview) behind the photo of an MPO.
            frames = 1 if opened.format == "MPO" else int(getattr(opened, "n_frames", 1))
            more = (f"{called} has {frames} frames, only the first is used",) if frames > 1 else ()
            return replace(_upright(opened, called), remarks=more)
    except _UNREADABLE as error:
        if isinstance(error, PictureError):
            raise
        if isinstance(error, FileNotFoundError):
            raise PictureError(f"{called} does not exist") from error
        # The text of an unidentified one is its path once more.
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else error
        raise PictureError(f"{called} is no readable picture ({reason})") from error


def unit_range(values: np.ndarray, called: str) -> np.ndarray:
    """Take float values that run from 0 to 1, but for what rounding adds.

    Args:
        values: Of any shape.
        called: What the error names.

    Raises:
        PictureError: If they leave that range, or some are no numbers.
    """
    low, high = float(values.min()), float(values.max())
    if not -_STEP / 2 <= low <= high <= 1 + _STEP / 2:
        raise PictureError(
            f"{called} has values from {low} to {high}; expected 0 to 1, as floats are understood; scale them"
        )
    return values.clip(0, 1)


def _open(source: Path | BinaryIO, called: str) -> Image.Image:
    path = source.path if isinstance(source, FileContent) else source
    if not isinstance(path, Path):
        return Image.open(source)
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    if path.is_file() and not path.stat().st_size:
        raise ValueError("the file is empty")
    if path.suffix.lower() not in HEIF_SUFFIXES:
        return Image.open(source)
    try:
        import pillow_heif
    except ImportError as error:
        raise PictureError(
            f"{called} is HEIC, which needs pillow-heif (pip install 'diffusers-mixofshow[heic]'); or save it as JPEG"
        ) from error
    opened: Image.Image = pillow_heif.open_heif(source).to_pillow()
    return opened


def _upright(image: Image.Image, called: str) -> Opened:
    """The picture turned upright, in a mode that Pillow converts."""
    tags = getattr(image, "tag_v2", {})  # a turned copy has none
    white = _white(image, tags)
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("La", "RGBa"):  # the colours multiplied by alpha
        upright = upright.convert(upright.mode.upper())
    if not (upright.mode.startswith("I") or upright.mode == "F"):
        return Opened(image=upright, deep=None)
    if "transparency" in upright.info:
        raise PictureError(f"{called} has more than 8 bits and one transparent grey; save it with an alpha channel")
    values = np.asarray(upright).astype(np.float64)
    if upright.mode == "F":
        deep = unit_range(values, called)
    else:
        if white == 2**32 - 1:  # Pillow reads all 32 bits as signed
            values = values % 2**32
        if values.min() < 0:
            raise PictureError(f"{called} has values below 0; expected 0 to {white}")
        deep = values / white
    return Opened(image=upright, deep=1 - deep if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else deep)


def _white(image: Image.Image, tags: Mapping[int, Any]) -> int:
    """The largest whole number that a picture of more than 8 bits can hold."""
    if tags:
        bits, kind = (tags.get(tag, 1) for tag in (_BITS, _FORMAT))
        bits, kind = (value[0] if isinstance(value, tuple) else value for value in (bits, kind))
        return int(2 ** (bits - (kind == _SIGNED)) - 1)
    # Pillow has PNM files of 16 bits in its mode of 32.
    return 2**31 - 1 if image.mode == "I" and image.format not in ("PPM", "PNG") else 2**16 - 1


def _darkness(values: np.ndarray, mode: str, called: str) -> tuple[str, ...]:
    """Say so where next to nothing can be seen, which most often comes from values that are small for their mode."""
    brightest = float(values.max()) / _STEP
    if 0 < brightest < 0.5:
        raise PictureError(
            f"{called} would be black: its values reach {brightest / 255:.2g} of what its mode ({mode}) can hold; "
            "save it with 8 bits"
        )
    almost = f"{called} is almost black: its values reach {brightest / 255:.2g} of what its mode ({mode}) can hold"
    return (almost,) if 0 < brightest < 2 else ()


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
