"""Parse regions and isolation from the command line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_mixofshow.errors import MixOfShowError, PictureError, RegionError


if TYPE_CHECKING:
    from diffusers_mixofshow.regions import Isolation, Region

_COLON = re.compile(r"(?<!mask=[A-Za-z]):")
"""The colon before a region's prompt; not that of a Windows path, ``mask=C:...``."""
_TEXTS = ("mask", "rounding")
_NOT_HERE = ("prompt", "box", "negative_prompt")
"""Arguments of `Region` that are no settings in the text: it gives two in another way, and the last needs a layout."""


def parse_regions(texts: Sequence[str]) -> list[Region]:
    """Read every text as a region, see `parse_region`.

    Raises:
        RegionError: Names all that are wrong.
    """
    regions, defects = [], []
    for text in texts:
        try:
            regions.append(parse_region(text))
        except MixOfShowError as error:
            defects.append(str(error))
    if defects:
        raise RegionError(" ".join(defects))
    return regions


def parse_region(text: str) -> Region:
    """Read ``left,top,right,bottom:prompt`` or ``mask=FILE:prompt``; settings such as ``feather=0.1`` follow a comma.

    Raises:
        RegionError: If the text is not of that form, the box is not inside the picture, the mask cannot be read, or a
            setting is out of range.
    """
    from diffusers_mixofshow.regions import Region

    head, *prompt = _COLON.split(text, maxsplit=1)
    pieces = [piece.strip() for piece in head.split(",")]
    given = dict(piece.split("=", 1) for piece in pieces if "=" in piece)
    numbers = [piece for piece in pieces if "=" not in piece]
    known = [field.name for field in dataclasses.fields(Region) if field.name not in _NOT_HERE]
    try:
        box = tuple(float(number) for number in numbers)
        if not prompt:
            raise ValueError("it has no prompt")
        if len(box) != (0 if "mask" in given else 4):
            raise ValueError(f"it has {len(box)} numbers; a box has four, and mask= takes the place of a box")
        if strange := [name for name in given if name not in known]:
            raise ValueError(f"it has {', '.join(strange)}; known are {', '.join(known)}")
        settings = {name: _parse_value(name, value) for name, value in given.items()}
    except PictureError as error:
        raise RegionError(f"Region {text!r}: {error}.") from error
    except ValueError as error:
        raise RegionError(
            f"Region {text!r} is not of the form 'left,top,right,bottom:prompt', e.g. '0,0,0.5,1:a <potter>', or "
            f"'mask=FILE,feather=0.1:prompt': {error}."
        ) from error
    return Region(prompt[0].strip(), box=box or None, **settings)  # type: ignore[arg-type]


def parse_isolation(steps: str | None, scales: str | None) -> Isolation:
    """Read the part of the steps, ``0,0.5``, and the feature maps, ``2,4,8``, in which regions are kept apart.

    Raises:
        RegionError: If a text is not of that form, or a number is out of range.
    """
    from diffusers_mixofshow.regions import Isolation

    try:
        start, end = (0.0, 1.0) if steps is None else (float(number) for number in steps.split(","))
        maps = None if scales is None else tuple(int(number) for number in scales.split(","))
    except ValueError as error:
        raise RegionError(
            f"Got --isolation-steps {steps} and --isolation-scales {scales}; expected fractions of the steps such as "
            "0,0.5, and powers of two such as 2,4,8."
        ) from error
    return Isolation(start=start, end=end, scales=maps)


def _parse_value(name: str, text: str) -> Any:
    from diffusers_mixofshow.masks import load_mask

    if name == "mask":
        return load_mask(Path(text), called=text).values
    if name in _TEXTS:
        return text
    return int(text) if name == "order" else float(text)
