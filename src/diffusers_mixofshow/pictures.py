"""Read pictures of any kind, from a file or in memory, as upright 8-bit RGB with their alpha channel."""

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
"""Endings that Pillow cannot read without the optional package pillow-heif."""

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
    """Bytes of a file as they were read, with path and digest, so that a record can name the content that was used."""

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

_UNREADABLE = (OSError, ValueError, TypeError, SyntaxError, EOFError, Image.DecompressionBombError)
_BITS, _PHOTOMETRIC, _FORMAT = 258, 262, 339
"""Numbers of TIFF's tags BitsPerSample, PhotometricInterpretation and SampleFormat."""
_WHITE_IS_ZERO, _SIGNED = 0, 2
"""TIFF's values of PhotometricInterpretation and SampleFormat."""
_STEP = 1 / 255
"""One step of 8-bit values, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as RGB, and its alpha channel.

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
    """A picture in the mode that it was stored in.

    Args:
        image: Of any mode, turned upright.
        deep: Values in [0, 1], shape (height, width), of a picture of more than 8 bits; None for one of 8 bits.
        remarks: Sentences about what is unusual in the file, to be told to the user.
    """

    image: Image.Image
    deep: np.ndarray | None
    remarks: tuple[str, ...] = ()


def is_picture(path: Path) -> bool:
    """Whether the file's ending is a picture's."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def read_image(source: Source, *, called: str) -> Image.Image:
    """Read a picture as upright RGB, and warn of each of its `remarks`; see `read_picture`."""
    picture = read_picture(source, called=called)
    for remark in picture.remarks:
        warn(remark)
    return picture.image


def read_picture(source: Source, *, called: str) -> Picture:
    """Read a picture of any mode: palettes, greyscale, 16 and 32 bits, floats from 0 to 1, CMYK and alpha included.

    Values of more than 8 bits are scaled by the largest value of the mode, never by the brightest pixel.

    Args:
        source: A file, or a picture in memory.
        called: How errors and remarks name it.

    Raises:
        PictureError: If it cannot be read, needs a package that is not installed, or can be understood in two ways.
    """
    opened = open_upright(source, called=called)
    if opened.deep is None:
        return Picture(
            image=_flatten_on_white(opened.image), alpha=_extract_alpha(opened.image), remarks=opened.remarks
        )
    dark = _check_brightness(opened.deep, opened.image.mode, called)
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
            return _turn_upright(source, called)
        with _open(source, called) as opened:
            # In an MPO file of a phone the first frame is the photo; the others are a depth map or a preview.
            frames = 1 if opened.format == "MPO" else int(getattr(opened, "n_frames", 1))
            more = (f"{called} has {frames} frames, only the first is used",) if frames > 1 else ()
            return replace(_turn_upright(opened, called), remarks=more)
    except _UNREADABLE as error:
        if isinstance(error, PictureError):
            raise
        if isinstance(error, FileNotFoundError):
            raise PictureError(f"{called} does not exist") from error
        # UnidentifiedImageError's own message would only repeat the path.
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else error
        raise PictureError(f"{called} is no readable picture ({reason})") from error


def clip_to_unit_range(values: np.ndarray, called: str) -> np.ndarray:
    """Clip values to [0, 1]; refuse those that leave it by more than half a step of 8 bits, as rounding does not.

    Args:
        values: Of any shape.
        called: How the error names the picture.

    Raises:
        PictureError: If a value is outside, or NaN.
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
            f'{called} is HEIC, which needs pillow-heif (pip install "diffusers-mixofshow[heic]"); or save it as JPEG'
        ) from error
    opened: Image.Image = pillow_heif.open_heif(source).to_pillow()
    return opened


def _turn_upright(image: Image.Image, called: str) -> Opened:
    """Turn a picture upright by its EXIF data, and scale values of more than 8 bits to [0, 1]."""
    if not all(image.size):
        raise PictureError(f"{called} has no pixels: it is {image.width} x {image.height}")
    tags = getattr(image, "tag_v2", {})  # read before turning: the copy that Pillow turns has no TIFF tags
    white = _largest_value(image, tags)
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("La", "RGBa"):  # premultiplied alpha, which Pillow converts to few modes
        upright = upright.convert(upright.mode.upper())
    if not (upright.mode.startswith("I") or upright.mode == "F"):
        return Opened(image=upright, deep=None)
    if "transparency" in upright.info:
        raise PictureError(f"{called} has more than 8 bits and one transparent grey; save it with an alpha channel")
    values = np.asarray(upright).astype(np.float64)
    if upright.mode == "F":
        deep = clip_to_unit_range(values, called)
    else:
        if white == 2**32 - 1:  # Pillow reads all 32 bits as signed
            values = values % 2**32
        if values.min() < 0:
            raise PictureError(f"{called} has values below 0; expected 0 to {white}")
        deep = values / white
    return Opened(image=upright, deep=1 - deep if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else deep)


def _largest_value(image: Image.Image, tags: Mapping[int, Any]) -> int:
    """The largest whole number that a picture of more than 8 bits can hold."""
    if tags:
        bits, kind = (tags.get(tag, 1) for tag in (_BITS, _FORMAT))
        bits, kind = (value[0] if isinstance(value, tuple) else value for value in (bits, kind))
        return int(2 ** (bits - (kind == _SIGNED)) - 1)
    # Pillow opens 16-bit PGM and PNG files in mode I, which has 32 bits.
    return 2**31 - 1 if image.mode == "I" and image.format not in ("PPM", "PNG") else 2**16 - 1


def _check_brightness(values: np.ndarray, mode: str, called: str) -> tuple[str, ...]:
    """Refuse a picture that would be black in 8 bits, return a remark on one that would be almost black.

    Most often its values fill only the low end of their mode, such as 8-bit values in a 16-bit file.
    """
    brightest = float(values.max()) / _STEP
    if 0 < brightest < 0.5:
        raise PictureError(
            f"{called} would be black: its values reach {brightest / 255:.2g} of what its mode ({mode}) can hold; "
            "save it with 8 bits"
        )
    almost = f"{called} is almost black: its values reach {brightest / 255:.2g} of what its mode ({mode}) can hold"
    return (almost,) if 0 < brightest < 2 else ()


def _flatten_on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _extract_alpha(image: Image.Image) -> Image.Image | None:
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha
