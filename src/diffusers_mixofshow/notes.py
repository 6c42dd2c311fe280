"""Generation settings inside picture files: A1111's text for other programs, JSON for this one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from diffusers_mixofshow.atomic import write_picture
from diffusers_mixofshow.base_models import public_name
from diffusers_mixofshow.errors import ConfigurationError, warn
from diffusers_mixofshow.versions import installed_version


KEY = "mixofshow"
"""Names our JSON in a PNG; in JPEG and WebP it is the maker's note."""
_INFOTEXT = "parameters"
"""Names the text in a PNG that A1111 writes and most programs read; in JPEG and WebP it is the user's comment."""
_UNICODE = b"UNICODE\0"
_LONGEST_EXIF = 65_533
"""Bytes that fit into a JPEG, with the six that mark them."""
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, RecursionError)

_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSinglestepScheduler": "DPM++ 2S",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}
"""diffusers' schedulers as other programs call them."""


def sheet_note(
    rows: Mapping[str, Sequence[tuple[str, int]]], *, base_model: str, steps: int, guidance: float
) -> dict[str, Any]:
    """What a sheet tells of its pictures.

    Args:
        rows: Label to prompt and seed of each picture in the row.
        base_model: Hub id, folder or ``toyland``.
        steps: Denoising steps.
        guidance: Guidance scale.
    """
    told = {label: [{"prompt": prompt, "seed": seed} for prompt, seed in row] for label, row in rows.items()}
    settings = {"base_model": public_name(base_model), "steps": steps, "guidance": guidance}
    return {"version": installed_version(), **settings, "rows": told}


def sampler_name(scheduler: type) -> str:
    """A class of schedulers as other programs call it."""
    name = scheduler.__name__
    return _SAMPLERS.get(name, name.removesuffix("Scheduler"))


def infotext(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """Describe a picture as A1111 does, whose text most programs and sites read.

    Args:
        prompt: In one line or several.
        negative_prompt: Likewise; may be empty.
        settings: In A1111's words, such as Steps, Sampler, CFG scale, Seed, Size; None is left out.
    """
    lines = [_in_one_line(prompt)]
    if negative_prompt.strip():
        lines.append(f"Negative prompt: {_in_one_line(negative_prompt)}")
    lines.append(", ".join(f"{name}: {_quote(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def write_with_note(
    path: Path, picture: Image.Image, kind: str, note: Mapping[str, Any], text: str | None = None
) -> None:
    """Write a picture with what is to be told of it; the file appears whole or not at all.

    Args:
        path: The file.
        picture: What it shows.
        kind: Pillow's name of the format: PNG, JPEG or WEBP.
        note: JSON values, for `read_note`.
        text: For other programs, see `infotext`.

    Raises:
        FileWriteError: See `write_picture`.
    """
    content = json.dumps(note, ensure_ascii=False)
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        if text is not None:
            chunks.add_text(_INFOTEXT, text)  # as iTXt where Latin-1 does not hold it
        chunks.add_text(KEY, content)
        write_picture(path, picture, kind, pnginfo=chunks)
        return
    exif = _exif(text, content)
    if kind == "JPEG" and len(exif) > _LONGEST_EXIF:
        exif = _exif(text, None)
        warn(
            f"{path} does not say how to draw it again: masks of regions make that longer than a JPEG can hold. "
            "Write a PNG instead."
        )
    write_picture(path, picture, kind, exif=exif)


def read_note(path: Path) -> dict[str, Any]:
    """What `write_with_note` noted in a picture.

    Raises:
        ConfigurationError: If the file is no picture, or says nothing that this package wrote.
    """
    try:
        with Image.open(path) as picture:
            content = _content(picture)
        note = None if content is None else json.loads(content)
    except _UNREADABLE as error:
        raise ConfigurationError(f"{path} cannot be read as a picture that tells how it was made: {error}.") from error
    if not isinstance(note, dict):
        raise ConfigurationError(
            f"{path} does not tell how it was made. Expected a picture that mixofshow wrote, not saved anew by others."
        )
    return note


def _content(picture: Image.Image) -> str | None:
    if isinstance(picture, PngImagePlugin.PngImageFile):
        return picture.text.get(KEY)
    content = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.MakerNote)
    return content.decode("utf-8") if isinstance(content, bytes) else None


def _exif(text: str | None, content: str | None) -> bytes:
    tags: dict[int, bytes] = {}
    if text is not None:
        tags[ExifTags.Base.UserComment] = _UNICODE + text.encode("utf-16-be")
    if content is not None:
        tags[ExifTags.Base.MakerNote] = content.encode("utf-8")
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = tags  # Pillow 10 forgets what is put into get_ifd() of an empty one
    return exif.tobytes()


def _in_one_line(text: str) -> str:
    """Readers of the text tell its parts apart by what lines begin with."""
    return " ".join(text.split("\n")).strip()


def _quote(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:"\n') else text
