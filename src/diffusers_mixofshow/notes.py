"""Generation settings inside picture files: A1111's text for other programs, JSON for this package."""

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
"""PNG text chunk that holds our JSON; JPEG and WebP hold it in EXIF's MakerNote."""
_INFOTEXT = "parameters"
"""PNG text chunk that A1111 writes and most programs read; JPEG and WebP hold that text in EXIF's UserComment."""
_UNICODE = b"UNICODE\0"
_LONGEST_EXIF = 65_533
"""Largest EXIF block of a JPEG in bytes, including its six bytes of marker."""
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
"""Class of a diffusers scheduler to A1111's name of the sampler."""


def make_sheet_note(
    rows: Mapping[str, Sequence[tuple[str, int]]], *, base_model: str, steps: int, guidance: float
) -> dict[str, Any]:
    """Describe the pictures of a sheet, for `write_with_note`.

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
    """A1111's name of a scheduler's sampler; the class's own name if it has none."""
    name = scheduler.__name__
    return _SAMPLERS.get(name, name.removesuffix("Scheduler"))


def format_infotext(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """Describe a picture in A1111's text format, which most programs and sites read.

    Args:
        prompt: In one line or several.
        negative_prompt: Likewise; may be empty.
        settings: By A1111's names, such as Steps, Sampler, CFG scale, Seed, Size; a value of None is left out.
    """
    lines = [_join_lines(prompt)]
    if negative_prompt.strip():
        lines.append(f"Negative prompt: {_join_lines(negative_prompt)}")
    lines.append(", ".join(f"{name}: {_quote(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def write_with_note(
    path: Path, picture: Image.Image, kind: str, note: Mapping[str, Any], text: str | None = None
) -> None:
    """Write a picture and its description into one file, which appears whole or not at all.

    Args:
        path: The file.
        picture: What it shows.
        kind: Pillow's name of the format: PNG, JPEG or WEBP.
        note: JSON values, for `read_note`.
        text: For other programs, see `format_infotext`.

    Raises:
        FileWriteError: See `write_picture`.

    Warns:
        MixOfShowWarning: If a JPEG cannot hold the note, which is then left out.
    """
    content = json.dumps(note, ensure_ascii=False)
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        if text is not None:
            chunks.add_text(_INFOTEXT, text)  # Pillow writes iTXt if Latin-1 cannot encode the text
        chunks.add_text(KEY, content)
        write_picture(path, picture, kind, pnginfo=chunks)
        return
    exif = _make_exif(text, content)
    if kind == "JPEG" and len(exif) > _LONGEST_EXIF:
        exif = _make_exif(text, None)
        warn(
            f"{path} does not say how to draw it again: masks of regions make that longer than a JPEG can hold. "
            "Write a PNG instead."
        )
    write_picture(path, picture, kind, exif=exif)


def read_note(path: Path) -> dict[str, Any]:
    """Read the note that `write_with_note` put into a picture.

    Raises:
        ConfigurationError: If the file is no picture, or says nothing that this package wrote.
    """
    try:
        with Image.open(path) as picture:
            content = _read_content(picture)
        note = None if content is None else json.loads(content)
    except _UNREADABLE as error:
        raise ConfigurationError(f"{path} cannot be read as a picture that tells how it was made: {error}.") from error
    if not isinstance(note, dict):
        raise ConfigurationError(
            f"{path} does not tell how it was made. Expected a picture that mixofshow wrote, not saved anew by others."
        )
    return note


def _read_content(picture: Image.Image) -> str | None:
    if isinstance(picture, PngImagePlugin.PngImageFile):
        return picture.text.get(KEY)
    content = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.MakerNote)
    return content.decode("utf-8") if isinstance(content, bytes) else None


def _make_exif(text: str | None, content: str | None) -> bytes:
    tags: dict[int, bytes] = {}
    if text is not None:
        tags[ExifTags.Base.UserComment] = _UNICODE + text.encode("utf-16-be")
    if content is not None:
        tags[ExifTags.Base.MakerNote] = content.encode("utf-8")
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = tags  # Pillow 10 loses values set in get_ifd() of an empty Exif
    return exif.tobytes()


def _join_lines(text: str) -> str:
    """Remove line breaks: programs that read A1111's text take the start of a line for the name of a part."""
    return " ".join(text.split("\n")).strip()


def _quote(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:"\n') else text
