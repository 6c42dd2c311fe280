"""Training pictures that show the concept twice, composed of its photos by their masks.

A concept tuned on pictures of itself alone keeps its looks where a prompt names it first, and half loses them where a
prompt names it later, as it was never trained at a later position.
"""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from diffusers_mixofshow.concepts import Concept, replace_mention
from diffusers_mixofshow.errors import warn
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.pictures import Photo


WORDINGS = (
    "{0} and {0}",
    "{0} and {0}",
    "{0} on the left and {0} on the right",
    "{0} left of {0}",
    "{0} beside {0}",
)
"""How captions name the concept twice; each is drawn with equal chance."""

_PLACES = 2
_HEIGHTS = (0.5, 0.68)
"""Least and largest height of a cut-out, as fractions of the picture's height."""
_WIDEST = 0.97
"""Largest width of a cut-out, as a fraction of its column's width."""
_GROUNDS = (0.84, 0.97)
"""Range of a cut-out's lower edge, as fractions of the picture's height from the top.

One whose photo cuts it off below stands at the picture's edge instead.
"""
_INSIDE = 128
"""A pixel of a mask from this value on, of 255, is inside."""
_RIM = 0.01
"""How far a subject's mask is widened before the subject is removed, as a fraction of the picture's width."""


def compose_company(photos: Sequence[Photo], config: TrainingConfig) -> list[Photo]:
    """Compose square pictures that show the concept twice, side by side, on the backgrounds of its photos.

    Args:
        photos: The concept's photos; those with a mask give the cut-outs and the backgrounds.
        config: The share of composed pictures among all, the concept, and the seed that draws photos, sizes, places
            and wordings.

    Returns:
        The composed pictures, with the captions of the photos that give their backgrounds. `Photo.known` leaves out
        where a background is not known: behind a subject that was removed.

    Warns:
        MixOfShowWarning: If no photo has a mask, so that nothing can be composed.
    """
    masked = [photo for photo in photos if photo.mask is not None]
    if not config.company or config.kind == "scene":
        return []
    if not masked:
        folder = "FOLDER" if config.instance_data_dir is None else shlex.quote(str(config.instance_data_dir))
        copy = f", for a copy of {config.dataset_name} in FOLDER" if config.dataset_name else ""
        warn(
            "No photo has a mask. Training works without masks; with them (masks/NAME.png, white is the concept, or "
            "photos that are cut out) pictures with the concept twice are composed, and it keeps its looks better "
            f"beside others. `mixofshow masks {folder} --class-word {shlex.quote(config.class_word)}` makes "
            f"them{copy} (it downloads a model of 600 MB once), in Python make_masks, and any paint program does: a "
            "picture of the photo's size, black with the concept in white; --company 0 (company=0) is training "
            "without such pictures, which needs no masks."
        )
        return []
    chance = random.Random(config.seed)
    count = round(len(photos) * config.company / (1 - config.company))
    grounds = [chance.sample(masked, len(masked)) for _ in range(0, count, len(masked))]
    return [
        _compose(ground, masked, config.concept_to_learn, chance)
        for ground in list(chain.from_iterable(grounds))[:count]
    ]


@dataclass(frozen=True)
class _Cutout:
    """A subject cropped from its photo, its mask (mode L), and whether the photo's lower edge cuts it off."""

    image: Image.Image
    mask: Image.Image
    cut_off: bool


def _compose(ground: Photo, masked: Sequence[Photo], concept: Concept, chance: random.Random) -> Photo:
    image, known = _remove_subject(ground)
    mask = Image.new("L", image.size)
    for place in range(_PLACES):
        cutout = _cut_out(chance.choice(masked))
        left, top, size = _place_cutout(cutout, image.width, place, chance)
        subject = cutout.image.resize(size, Image.Resampling.LANCZOS)
        shape = cutout.mask.resize(size, Image.Resampling.BOX)
        image.paste(subject, (left, top), shape)
        mask.paste(shape, (left, top), shape)
        known.paste(255, (left, top, left + size[0], top + size[1]), shape)
    captions = tuple(_name_twice(caption, concept, chance) for caption in ground.captions)
    side = min(ground.true_size)
    return Photo(path=ground.path, image=image, captions=captions, mask=mask, known=known, original_size=(side, side))


def _remove_subject(photo: Photo) -> tuple[Image.Image, Image.Image]:
    """The photo's middle square with the subject replaced by colours around it, and the mask of unchanged pixels."""
    side = min(photo.image.size)
    image = ImageOps.fit(photo.image, (side, side))
    subject = ImageOps.fit(_mask_of(photo), (side, side), Image.Resampling.BOX)
    inside = subject.filter(ImageFilter.MaxFilter(2 * max(1, round(_RIM * side)) + 1))
    known = np.asarray(inside)[..., None] < _INSIDE
    filled = fill_unknown(np.asarray(image, dtype=np.float64), known)
    return Image.fromarray(filled.round().astype(np.uint8)), Image.fromarray(known[..., 0].astype(np.uint8) * 255)


def fill_unknown(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Give unknown pixels the mean of the smallest aligned square of 2, 4, 8, ... pixels that has known ones.

    The mean of a square is that of its quarters with known pixels, however many each has.

    Args:
        values: Shape (height, width, channels), float.
        known: Booleans of shape (height, width, 1).

    Returns:
        Shape (height, width, channels); zeros where nothing is known.
    """
    height, width = known.shape[:2]
    if known.all() or max(height, width) == 1:
        return np.where(known, values, 0)
    counts, sums = (_sum_quarters(part) for part in (known.astype(np.float64), np.where(known, values, 0)))
    coarse = fill_unknown(sums / np.maximum(counts, 1), counts > 0)
    return np.where(known, values, coarse.repeat(2, axis=0).repeat(2, axis=1)[:height, :width])


def _sum_quarters(values: np.ndarray) -> np.ndarray:
    """Sums over squares of 2 x 2 pixels, of (height, width, channels)."""
    padded = np.pad(values, ((0, values.shape[0] % 2), (0, values.shape[1] % 2), (0, 0)))
    return padded[::2, ::2] + padded[1::2, ::2] + padded[::2, 1::2] + padded[1::2, 1::2]


def _cut_out(photo: Photo) -> _Cutout:
    mask = _mask_of(photo)
    box = mask.point(lambda value: 255 * (value >= _INSIDE)).getbbox() or (0, 0, *mask.size)
    return _Cutout(photo.image.crop(box), mask.crop(box), cut_off=box[3] == mask.height)


def _mask_of(photo: Photo) -> Image.Image:
    return photo.mask or Image.new("L", photo.image.size, 255)


def _place_cutout(cutout: _Cutout, side: int, place: int, chance: random.Random) -> tuple[int, int, tuple[int, int]]:
    """Draw a cut-out's place in its column: left, top and (width, height) in pixels."""
    column, shape = side / _PLACES, cutout.image.width / cutout.image.height
    height = min(chance.uniform(*_HEIGHTS) * side, _WIDEST * column / shape)
    left = place * column + chance.random() * (column - height * shape)
    bottom = side if cutout.cut_off else chance.uniform(*_GROUNDS) * side
    return round(left), round(bottom - height), (max(1, round(height * shape)), max(1, round(height)))


def _name_twice(caption: str, concept: Concept, chance: random.Random) -> str:
    """Replace the caption's first mention of the concept, also by its tokens, by one of `WORDINGS`."""
    token = f"(?:{'|'.join(map(re.escape, concept.tokens))})"
    caption = re.sub(rf"{token}(?:\s*{token})*", concept.placeholder, caption)
    called = concept.placeholder + chance.choice(("", f" {concept.class_word}"))
    together = chance.choice(WORDINGS)
    return replace_mention(
        caption, [concept], lambda article, _: together.format(f"a {called}" if article else called)
    )
