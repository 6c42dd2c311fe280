"""Masks of any kind, from a file or in memory: where the concept, or the region, is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from diffusers_mixofshow.errors import PictureError, warn
from diffusers_mixofshow.pictures import Opened, Source, clip_to_unit_range, open_upright


_BARELY_COLOURED = 16
"""A colour whose channels differ by no more than this, of 255, counts as grey."""
_BLACK, _WHITE = 64, 192
"""A grey up to the first value, of 255, means outside; from the second value on, inside."""
_OPAQUE = 240
"""An alpha channel that is nowhere below this value, of 255, marks nothing."""
_MOST_LABELS = 16
"""A picture with at most this many values may hold labels (small whole numbers); a soft mask has more values."""
_NEARLY_WHITE = 0.94
"""A mask whose brightest value, of 1, is below this may hold labels; a soft mask reaches white."""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A mask, read.

    Args:
        values: 1 inside, 0 outside, between them at soft edges; float64, shape (height, width).
        remarks: Sentences about what is unusual in the file, to be told to the user.
    """

    values: np.ndarray
    remarks: tuple[str, ...] = ()

    @property
    def inside(self) -> np.ndarray:
        """Where the mask is above one half, booleans of shape (height, width)."""
        return self.values > 0.5

    @property
    def grey(self) -> Image.Image:
        """The mask as a picture of mode L, white inside."""
        return Image.fromarray(np.rint(self.values * 255).astype(np.uint8))


def read_mask(source: Source | np.ndarray | torch.Tensor, *, called: str) -> Mask:
    """Read a mask.

    Inside is the white; or, if the alpha channel varies, the opaque; or the only label other than 0; or the only
    colour other than black. Floats run from 0 to 1, whole numbers from 0 to 255, with 16 bits to 65535.

    Args:
        source: A file, a picture of any mode, or an array or tensor of shape (height, width).
        called: How errors and remarks name it.

    Raises:
        PictureError: If it cannot be read, or can be understood in more than one way.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return Mask(values=_mask_from_array(_to_array(source, called), called))
    opened = open_upright(source, called=called)
    return Mask(values=_mask_from_picture(opened, called), remarks=opened.remarks)


def load_mask(source: Source, *, called: str) -> Mask:
    """Read a mask, and warn of each of its `remarks`; see `read_mask`."""
    mask = read_mask(source, called=called)
    for remark in mask.remarks:
        warn(remark)
    return mask


def read_alpha(alpha: Image.Image, *, called: str) -> Mask | None:
    """Read the alpha channel of a cut-out, mode L, as its mask; None where it is opaque everywhere, or nearly so.

    Raises:
        PictureError: If it is nowhere more than half opaque.
    """
    values = _mask_from_alpha(np.asarray(alpha), called)
    return None if values is None else Mask(values=values)


def _to_array(given: np.ndarray | torch.Tensor, called: str) -> np.ndarray:
    """Convert an array or tensor to an array of shape (height, width); axes of length 1 are dropped."""
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
    array = given
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 or not array.size:
        raise PictureError(f"{called} has shape {tuple(given.shape)}; expected (height, width)")
    if array.dtype.kind not in "buif":
        raise PictureError(f"{called} has values of type {array.dtype}; expected booleans, whole numbers or floats")
    return array


def _mask_from_array(array: np.ndarray, called: str) -> np.ndarray:
    values = array.astype(np.float64)
    if array.dtype.kind == "b":
        return values
    if array.dtype.kind == "f":
        return _require_bright(clip_to_unit_range(values, called), called)
    limit = 65535 if array.dtype.kind == "u" and array.dtype.itemsize == 2 else 255
    low, high = int(array.min()), int(array.max())
    if not 0 <= low <= high <= limit:
        raise PictureError(f"{called} has values from {low} to {high}; expected 0 to {limit}")
    return _mask_from_levels(values / limit, called)


def _mask_from_picture(opened: Opened, called: str) -> np.ndarray:
    image = opened.image
    if opened.deep is not None:
        return (_require_bright if image.mode == "F" else _mask_from_levels)(opened.deep, called)
    colours = np.asarray(image.convert("RGB"))
    alpha = np.asarray(image.convert("RGBA").getchannel("A")) if image.has_transparency_data else None
    opaque = None if alpha is None else _mask_from_alpha(alpha, called)
    if alpha is None or opaque is None:
        return _mask_from_levels(_to_grey(colours, called) / 255, called)
    visible = colours[alpha > alpha.max() / 2]
    if not _is_coloured(visible) and visible.min() <= _BLACK and visible.max() >= _WHITE:
        raise PictureError(
            f"{called} is black and white and has an alpha channel as well, so that inside is either what is white or "
            "what is opaque; save it without the alpha channel, or in one colour"
        )
    return opaque


def _mask_from_alpha(alpha: np.ndarray, called: str) -> np.ndarray | None:
    """The opaque part as a mask; None if the picture is (nearly) equally opaque everywhere."""
    if alpha.max() == 0:
        raise PictureError(f"{called} is transparent everywhere; expected what is opaque, or white, to be inside")
    if alpha.min() == alpha.max() or alpha.min() >= _OPAQUE:
        return None
    return _require_bright(_make_binary(alpha / 255, alpha.min() / 255), called)


def _to_grey(colours: np.ndarray, called: str) -> np.ndarray:
    """Grey values up to 255, shape (height, width), of greys or of black and one colour (height, width, 3)."""
    if not _is_coloured(colours):
        return colours.max(axis=2).astype(np.float64)
    other = colours.any(axis=2)
    if not other.all() and (colours[other] == colours[other][0]).all():
        return np.where(other, 255.0, 0.0)
    raise PictureError(
        f"{called} has several colours, so that it is not known what is inside; expected black and white, or black "
        "and one other colour (of labels, only the concept's)"
    )


def _is_coloured(colours: np.ndarray) -> bool:
    """Whether any of the colours, RGB along the last axis, is not grey."""
    return bool((colours.max(axis=-1) - colours.min(axis=-1)).max() > _BARELY_COLOURED)


def _mask_from_levels(values: np.ndarray, called: str) -> np.ndarray:
    """A mask from grey values or from two labels; `values` are fractions of the largest number that fits the type."""
    values = _make_binary(values, 0)
    if 0 < values.max() < _NEARLY_WHITE and (count := len(np.unique(values))) <= _MOST_LABELS:
        raise PictureError(
            f"{called} has {count} values, none of them white, as pictures of labels have, so that it is not "
            "known which label is inside; expected black and white, or 0 and one other value"
        )
    return _require_bright(values, called)


def _make_binary(values: np.ndarray, low: float) -> np.ndarray:
    """Map two distinct values to 0 and 1, as of labels or a half-transparent brush; others stay as they are."""
    high = values.max()
    return (values > low).astype(np.float64) if ((values == low) | (values == high)).all() else values


def _require_bright(values: np.ndarray, called: str) -> np.ndarray:
    """Refuse a mask that is nowhere above one half, except for all zeros, which callers judge."""
    if 0 < values.max() <= 0.5:
        raise PictureError(
            f"{called} is nowhere brighter than {values.max():.2g} of its range; expected what is inside to be above "
            "one half"
        )
    return values
