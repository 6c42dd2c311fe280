"""Pictures of ``mixofshow sample`` tell how they were made, and what such a picture tells is read again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_mixofshow import notes
from diffusers_mixofshow.base_models import public_name
from diffusers_mixofshow.errors import ConfigurationError, warn
from diffusers_mixofshow.versions import PACKAGE, installed_version


if TYPE_CHECKING:
    from diffusers_mixofshow.regions import Layout
    from diffusers_mixofshow.sampling.control import Control
    from diffusers_mixofshow.sampling.drawing import Drawing, Drawn

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Ending of a picture to Pillow's name of its format."""

_NAME = re.compile(r"(?![.~])([^/\\]+/)?(?!\.)[^/\\]+")
"""A name in the folder where one is, or on the Hub; never a path that leads elsewhere."""
_NUMBERS = ("seed", "steps", "guidance", "strength", "lora_scale", "control_scale")
_NAMES = ("base", "concepts", "image", "mask")
_CONTROLS = ("control", "adapter")
_OTHERS = ("isolation", "isolation_steps", "isolation_scales", "draft", "refine", "dtype")


def write_drawn(files: Sequence[Path], drawing: Drawing, drawn: Drawn) -> None:
    """Write every picture with the settings that draw it again."""
    for file, image, seed in zip(files, drawn.images, drawing.seeds, strict=True):
        plan = dataclasses.replace(drawing.plan, width=image.width, height=image.height)
        note = _note(drawing, drawn, plan, seed)
        text = notes.infotext(plan.prompt or "", plan.negative_prompt or "", _settings(drawing, drawn, plan, seed))
        notes.write_with_note(file, image, FORMATS[file.suffix.lower()], note, text)


def read_layout(path: Path) -> Layout:
    """Read a layout file, or the layout of a picture that was drawn here."""
    from diffusers_mixofshow.regions import Layout

    if path.suffix.lower() not in FORMATS:
        return Layout.load(path)
    return Layout.from_description(notes.read_note(path).get("layout"), path)


def settings_of(path: Path) -> dict[str, Any]:
    """The options that draw a picture again, without those that say where to write.

    Strangers' pictures are read as well: of what one tells only numbers, switches and names are taken.

    Raises:
        ConfigurationError: If the picture does not tell them, or tells what no picture of ours does; names all of it.
    """
    told = notes.read_note(path).get("sample")
    if not isinstance(told, dict):
        raise ConfigurationError(f"{path} does not tell how it was sampled.")
    defects = [f"{name} {value!r}" for name, value in told.items() if not _is_allowed(name, value)]
    if defects:
        raise ConfigurationError(f"{path} tells what no picture of mixofshow does: {', '.join(defects)}.")
    # Pictures of the time before drafts tell nothing of them.
    return {"draft": False} | told | {"layout": str(path)}


def warn_of_changes(path: Path, drawing: Drawing) -> None:
    """Warn where what is read has other contents than when the picture was drawn whose settings are used."""
    if path.suffix.lower() not in FORMATS:
        return
    before = _read_digests(notes.read_note(path))
    now = {_pack_name(source): pack.digest for source, pack in drawing.packs.items()} | _digests(drawing)
    if changed := [name for name, digest in now.items() if before.get(name, digest) != digest]:
        warn(f"{', '.join(changed)} changed since {path} was drawn; the picture will be another one.")


def _read_digests(note: Mapping[str, Any]) -> dict[str, str]:
    """Name to digest of what a picture was drawn with, as far as it tells that as our pictures do."""
    packs, pictures = note.get("packs"), note.get("pictures")
    entries = [entry for entry in packs if isinstance(entry, dict)] if isinstance(packs, list) else []
    known = {str(entry.get("name")): str(entry.get("digest")) for entry in entries}
    return known | ({name: str(digest) for name, digest in pictures.items()} if isinstance(pictures, dict) else {})


def _pack_name(source: str) -> str:
    """A pack's name without private paths; the folder's name for a pack that is given by its file."""
    from diffusers_mixofshow.edlora.file import FILE_NAME

    path = Path(source)
    return public_name(str(path.parent) if path.name == FILE_NAME else source)


def _note(drawing: Drawing, drawn: Drawn, plan: Layout, seed: int) -> dict[str, Any]:
    """What draws the picture again: options, layout, and what was read and used."""
    packs = [
        {
            "name": _pack_name(source),
            "digest": pack.digest,
            "concepts": [concept.placeholder for concept in pack.concepts],
        }
        for source, pack in drawing.packs.items()
    ]
    return {
        "version": installed_version(),
        "layout": plan.describe(),
        "sample": _options(drawing, seed),
        "packs": packs,
        "sampler": drawn.scheduler.__name__,
        "device": drawn.device,
        "dtype": drawn.dtype,
        "pictures": _digests(drawing),
    }


def _digests(drawing: Drawing) -> dict[str, str]:
    """Name to SHA-256 of every picture that was read."""
    read = [drawing.image, drawing.mask, *drawing.followed]
    return {each.path.name: each.digest for each in read if each is not None}


def _options(drawing: Drawing, seed: int) -> dict[str, Any]:
    """The options that draw the picture again, beside its layout."""
    isolation = drawing.isolation
    told: dict[str, Any] = {
        "seed": seed,
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "base": public_name(drawing.base),
        "concepts": [_pack_name(source) for source in drawing.packs],
        "lora_scale": list(drawing.lora_scales),
        "control": [_format_control(control) for control in drawing.controls],
        "adapter": [_format_control(control) for control in drawing.adapters],
        "control_scale": list(drawing.control_scales),
        "refine": drawing.refine is not None,
        "isolation": isolation is not None,
        "isolation_steps": isolation and f"{isolation.start},{isolation.end}",
        "isolation_scales": isolation and isolation.scales and ",".join(map(str, isolation.scales)),
        "image": drawing.image and drawing.image.path.name,
        "mask": drawing.mask and drawing.mask.path.name,
        "strength": drawing.strength if drawing.image else None,
        "dtype": drawing.dtype and str(drawing.dtype),
    }
    told = {name: value for name, value in told.items() if value is not None and value is not False and value != []}
    return told | ({"draft": drawing.draft is not None} if drawing.plan.regions else {})


def _format_control(control: Control) -> str:
    return f"{control.detector}@{public_name(control.model)}={control.picture.name}"


def _settings(drawing: Drawing, drawn: Drawn, plan: Layout, seed: int) -> dict[str, object]:
    """The picture's settings in the words of A1111, and what that has no words for."""
    regions = [f"{_place(region)}: {region.prompt}" for region in plan.regions]
    return {
        "Steps": drawing.steps,
        "Sampler": notes.sampler_name(drawn.scheduler),
        "CFG scale": f"{drawing.guidance:g}",
        "Seed": seed,
        "Size": f"{plan.width}x{plan.height}",
        "Model": public_name(drawing.base).rpartition("/")[2],
        "Denoising strength": f"{drawing.strength:g}" if drawing.image else None,
        "Mix-of-Show packs": ", ".join(map(_pack_name, drawing.packs)) or None,
        "Mix-of-Show regions": " | ".join(regions) or None,
        "Version": f"{PACKAGE} {installed_version()}",
    }


def _place(region: Any) -> str:
    return "mask" if region.box is None else ",".join(f"{edge:g}" for edge in region.box)


def _is_allowed(name: str, value: object) -> bool:
    """Whether an option read from a picture has a name and a value that this package writes into pictures."""
    values = value if isinstance(value, list) else [value]
    if name in _NUMBERS:
        return all(isinstance(each, int | float) for each in values)
    if name in _NAMES:
        return all(isinstance(each, str) and _NAME.fullmatch(each) for each in values)
    if name in _CONTROLS:
        return all(isinstance(each, str) and _is_control(each) for each in values)
    return name in _OTHERS and isinstance(value, str | bool)


def _is_control(text: str) -> bool:
    left, _, picture = text.partition("=")
    return all(_NAME.fullmatch(part) for part in (*left.split("@"), picture))
