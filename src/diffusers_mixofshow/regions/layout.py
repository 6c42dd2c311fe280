"""A layout: regions, prompts and size of a picture, which is read from and written to JSON."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusers_mixofshow.atomic import check_outputs, encode_picture, write_whole
from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.masks import load_mask
from diffusers_mixofshow.regions.drawing import draw_regions
from diffusers_mixofshow.regions.region import Region
from diffusers_mixofshow.texts import read_text


FORMAT, VERSION = "mixofshow-layout", 1
_PNG = "data:image/png;base64,"
OF_PICTURE = ("prompt", "negative_prompt", "width", "height")
"""Fields of a `Layout` that are of the whole picture."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Regions, with the prompt, negative prompt and size of the whole picture.

    A pipeline takes it in place of a list of regions, ``pipe(prompt, regions=layout)``, or as all of its arguments,
    ``pipe(**layout.arguments())``.

    Args:
        regions: The regions.
        prompt: The global prompt.
        negative_prompt: The global negative prompt.
        width: Width of the picture in pixels.
        height: Height of the picture in pixels.

    Raises:
        RegionError: Names every defect at once.
    """

    regions: tuple[Region, ...] = ()
    prompt: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        """Check types and size."""
        object.__setattr__(self, "regions", tuple(self.regions))
        defects = [
            f"region {number} is a {type(region).__name__}, not a Region"
            for number, region in enumerate(self.regions)
            if not isinstance(region, Region)
        ]
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)):
                defects.append(f"its {name} is a {type(value).__name__}, not a text")
        for name in ("width", "height"):
            value = getattr(self, name)
            if not (value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)):
                defects.append(f"its {name} is {value!r}; expected pixels, a whole number above 0")
        if defects:
            raise RegionError("Layout: " + "; ".join(defects) + ".")

    def __iter__(self) -> Iterator[Region]:
        return iter(self.regions)

    def __len__(self) -> int:
        return len(self.regions)

    def with_region(
        self, prompt: str, box: tuple[float, float, float, float] | None = None, **settings: Any
    ) -> Layout:
        """Make a layout with one more region, its box in pixels of this layout.

        Args:
            prompt: The region's prompt.
            box: Left, top, right, bottom in pixels.
            settings: The other arguments of `Region`.

        Raises:
            RegionError: If the layout has no size, or the region is not valid.
        """
        if box is not None:
            if self.width is None or self.height is None:
                raise RegionError("A box in pixels needs Layout(width=..., height=...).")
            left, top, right, bottom = box
            box = (left / self.width, top / self.height, right / self.width, bottom / self.height)
        return dataclasses.replace(self, regions=(*self.regions, Region(prompt, box=box, **settings)))

    def arguments(self) -> dict[str, Any]:
        """The layout as arguments of a pipeline: ``pipe(**layout.arguments())``."""
        given = {name: getattr(self, name) for name in OF_PICTURE if getattr(self, name) is not None}
        return {**given, "regions": list(self.regions)}

    def draw(self, image: Image.Image | None = None) -> Image.Image:
        """Draw the regions with their prompts, on white or over a picture.

        Args:
            image: A picture of any size; it is not changed.

        Returns:
            A picture of the given one's size; without one, of the layout's size, or 512 x 512.
        """
        if image is None:
            image = Image.new("RGB", (self.width or 512, self.height or 512), "white")
        return draw_regions(self.regions, image)

    def describe(self) -> dict[str, Any]:
        """The layout as JSON values, masks included; the format is described in docs/regional_sampling.md."""
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        content |= {name: getattr(self, name) for name in OF_PICTURE if getattr(self, name) is not None}
        return content | {"regions": [_describe(region) for region in self.regions]}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the layout as JSON, masks included; the format is described in docs/regional_sampling.md.

        Args:
            path: The file.
            overwrite: Whether an existing file may be replaced.

        Raises:
            OverwriteError: If something is there already.
        """
        check_outputs(Path(path), overwrite=overwrite)
        content = self.describe()
        path = Path(path)
        write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Layout:
        """Read what `save` wrote, or what was written by hand.

        Args:
            path: The JSON file. A mask in it may also be the path of a picture, relative to the file.

        Raises:
            RegionError: If the file is no layout; names every defect at once.
        """
        path = Path(path)
        try:
            content = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise RegionError(f"{path} cannot be read as a layout: it is no JSON ({error}).") from error
        except (ValueError, RecursionError) as error:
            raise RegionError(f"{path} cannot be read as a layout: {error}") from error
        return cls.from_description(content, path)

    @classmethod
    def from_description(cls, content: object, path: Path) -> Layout:
        """Read what `describe` gives.

        Args:
            content: JSON values.
            path: The file that they are from, for errors; paths of masks are relative to its folder.

        Raises:
            RegionError: If it is no layout; names every defect at once.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
            raise RegionError(
                f'{path} is no layout: expected an object with "format": "{FORMAT}" and "version": {VERSION}.'
            )
        defects = _list_unknown("the file", content, {"format", "version", "regions", *OF_PICTURE})
        listed = content.get("regions", [])
        if not isinstance(listed, list):
            defects, listed = [*defects, "its regions are not a list"], []
        regions = []
        for number, described in enumerate(listed):
            try:
                regions.append(_read_region(number, described, path.parent))
            except RegionError as error:
                defects.append(str(error).rstrip("."))
        try:
            layout = cls(tuple(regions), **{name: content.get(name) for name in OF_PICTURE})
        except RegionError as error:
            defects.append(str(error).rstrip("."))
        if defects:
            raise RegionError(f"{path}: " + "; ".join(defects) + ".")
        return layout


def _describe(region: Region) -> dict[str, Any]:
    """Describe a region as JSON values, without those that are the defaults."""
    described: dict[str, Any] = {}
    for field in dataclasses.fields(region):
        value = getattr(region, field.name)
        if field.name == "mask" and value is not None:
            content = encode_picture(Image.fromarray(region.inside.numpy()), optimize=True)
            described["mask"] = _PNG + base64.b64encode(content).decode("ascii")
        elif field.default is dataclasses.MISSING or value != field.default:
            described[field.name] = list(value) if field.name == "box" else value
    return described


def _read_region(number: int, described: object, folder: Path) -> Region:
    if not isinstance(described, dict):
        raise RegionError(f"region {number} is no object")
    known = {field.name for field in dataclasses.fields(Region)}
    defects = _list_unknown(f"region {number}", described, known)
    settings = {name: value for name, value in described.items() if name in known}
    if "prompt" not in settings:
        defects.append(f"region {number} has no prompt")
    if isinstance(settings.get("mask"), str):
        try:
            settings["mask"] = _read_mask(settings["mask"], folder)
        except (OSError, ValueError) as error:
            defects.append(f"the mask of region {number} cannot be read: {error}")
    if defects:
        raise RegionError("; ".join(defects))
    return Region(**settings)


def _read_mask(given: str, folder: Path) -> np.ndarray:
    if given.startswith(_PNG):
        try:
            source: Path | io.BytesIO = io.BytesIO(base64.b64decode(given.removeprefix(_PNG), validate=True))
        except binascii.Error as error:
            raise ValueError(f"no base64 ({error})") from error
        return load_mask(source, called="it").values
    path = (folder / given).resolve()
    if not path.is_relative_to(folder.resolve()) or (path.exists() and not path.is_file()):
        raise ValueError(f"{given!r} is no file in the layout's folder")
    return load_mask(path, called=given).values


def _list_unknown(owner: str, given: Mapping[str, object], known: set[str]) -> list[str]:
    surplus = sorted(given.keys() - known)
    return [f"{owner} has {', '.join(surplus)}; known are {', '.join(sorted(known))}"] if surplus else []
