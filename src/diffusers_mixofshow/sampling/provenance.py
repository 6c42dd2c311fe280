"""Store the settings of ``mixofshow sample`` in its pictures, and read them from there."""

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
"""Ending of a picture's file to Pillow's name of its format."""

_NAME = re.compile(r"(?![.~])([^/\\]+/)?(?!\.)[^/\\]+")
"""A name in the current folder or on the Hub; never a path that leads out of the folder."""
_NUMBERS = ("seed", "steps", "guidance", "strength", "lora_scale", "control_scale")
_NAMES = ("base", "concepts", "image", "mask")
_CONTROLS = ("control", "adapter")
_OTHERS = ("isolation", "isolation_steps", "isolation_scales", "draft", "refine", "dtype")


def write_drawn(files: Sequence[Path], drawing: Drawing, drawn: Drawn) -> None:
    """Write every picture with the settings that draw it again."""
    for file, image, seed in zip(files, drawn.images, drawing.seeds, strict=True):
        plan = dataclasses.replace(drawing.plan, width=image.width, height=image.height)
        note = _make_note(drawing, drawn, plan, seed)
        settings = _describe_for_a1111(drawing, drawn, plan, seed)
        text = notes.format_infotext(plan.prompt or "", plan.negative_prompt or "", settings)
        notes.write_with_note(file, image, FORMATS[file.suffix.lower()], note, text)


def read_layout(path: Path) -> Layout:
    """Read a layout file, or the layout that a picture of this package stores."""
    from diffusers_mixofshow.regions import Layout

    if path.suffix.lower() not in FORMATS:
        return Layout.load(path)
    return Layout.from_description(notes.read_note(path).get("layout"), path)


def read_options(path: Path) -> dict[str, Any]:
    """Read the options that draw a picture again, without those that say where to write.

    A picture may come from a stranger, so that only numbers, switches and names are accepted, no paths.

    Raises:
        ConfigurationError: If the picture has no options, or some that this package does not write; names all of them.
    """
    options = notes.read_note(path).get("sample")
    if not isinstance(options, dict):
        raise ConfigurationError(f"{path} does not tell how it was sampled.")
    defects = [f"{name} {value!r}" for name, value in options.items() if not _is_allowed(name, value)]
    if defects:
        raise ConfigurationError(
            f"{path} holds options that mixofshow does not write into pictures: {', '.join(defects)}."
        )
    # Releases that had no drafts did not store the option.
    return {"draft": False} | options | {"layout": str(path)}


def warn_of_changes(path: Path, drawing: Drawing) -> None:
    """Warn of packs and pictures that have changed since the picture at `path` was drawn, whose settings are used."""
    if path.suffix.lower() not in FORMATS:
        return
    before = _read_digests(notes.read_note(path))
    now = {_name_pack(source): pack.digest for source, pack in drawing.packs.items()} | _list_digests(drawing)
    if changed := [name for name, digest in now.items() if before.get(name, digest) != digest]:
        warn(f"{', '.join(changed)} changed since {path} was drawn; the picture will be another one.")


def _read_digests(note: Mapping[str, Any]) -> dict[str, str]:
    """Name to digest of the packs and pictures in a note; entries of another form are ignored."""
    packs, pictures = note.get("packs"), note.get("pictures")
    entries = [entry for entry in packs if isinstance(entry, dict)] if isinstance(packs, list) else []
    known = {str(entry.get("name")): str(entry.get("digest")) for entry in entries}
    return known | ({name: str(digest) for name, digest in pictures.items()} if isinstance(pictures, dict) else {})


def _name_pack(source: str) -> str:
    """Name a pack without private paths; one that is given by its file has the folder's name."""
    from diffusers_mixofshow.edlora.file import FILE_NAME

    path = Path(source)
    return public_name(str(path.parent) if path.name == FILE_NAME else source)


def _make_note(drawing: Drawing, drawn: Drawn, plan: Layout, seed: int) -> dict[str, Any]:
    """Everything that a picture stores to be drawn again: options, layout, digests of what was read, versions."""
    packs = [
        {
            "name": _name_pack(source),
            "digest": pack.digest,
            "concepts": [concept.placeholder for concept in pack.concepts],
        }
        for source, pack in drawing.packs.items()
    ]
    return {
        "version": installed_version(),
        "layout": plan.describe(),
        "sample": _list_options(drawing, seed),
        "packs": packs,
        "sampler": drawn.scheduler.__name__,
        "device": drawn.device,
        "dtype": drawn.dtype,
        "pictures": _list_digests(drawing),
    }


def _list_digests(drawing: Drawing) -> dict[str, str]:
    """Name to SHA-256 of every picture that was read."""
    read = [drawing.image, drawing.mask, *drawing.followed]
    return {each.path.name: each.digest for each in read if each is not None}


def _list_options(drawing: Drawing, seed: int) -> dict[str, Any]:
    """The options that draw the picture again, beside its layout."""
    isolation = drawing.isolation
    options: dict[str, Any] = {
        "seed": seed,
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "base": public_name(drawing.base),
        "concepts": [_name_pack(source) for source in drawing.packs],
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
    given = {
        name: value for name, value in options.items() if value is not None and value is not False and value != []
    }
    return given | ({"draft": drawing.draft is not None} if drawing.plan.regions else {})


def _format_control(control: Control) -> str:
    return f"{control.detector}@{public_name(control.model)}={control.picture.name}"


def _describe_for_a1111(drawing: Drawing, drawn: Drawn, plan: Layout, seed: int) -> dict[str, object]:
    """The picture's settings under the names that A1111 uses, and under our own where it has none."""
    regions = [f"{_format_place(region)}: {region.prompt}" for region in plan.regions]
    return {
        "Steps": drawing.steps,
        "Sampler": notes.sampler_name(drawn.scheduler),
        "CFG scale": f"{drawing.guidance:g}",
        "Seed": seed,
        "Size": f"{plan.width}x{plan.height}",
        "Model": public_name(drawing.base).rpartition("/")[2],
        "Denoising strength": f"{drawing.strength:g}" if drawing.image else None,
        "Mix-of-Show packs": ", ".join(map(_name_pack, drawing.packs)) or None,
        "Mix-of-Show regions": " | ".join(regions) or None,
        "Version": f"{PACKAGE} {installed_version()}",
    }


def _format_place(region: Any) -> str:
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
