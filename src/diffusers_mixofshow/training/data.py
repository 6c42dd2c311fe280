"""A folder of photos, captions and masks to tensors: every defect is found before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from diffusers_mixofshow.concepts import Concept, mentions_concept, split_prompt
from diffusers_mixofshow.errors import ConceptError, TrainingDataError


PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_SLOT = "<TOK>"
"""Stands for the concept in captions and templates, whatever the concept is called."""

TEMPLATES = (
    "a photo of a <TOK>",
    "a picture of a <TOK>",
    "a close-up photo of a <TOK>",
    "a good photo of a <TOK>",
    "a rendition of a <TOK>",
)
"""Captions of photos that have none, after textual inversion (arXiv:2208.01618, supplementary)."""

_ASPECT_TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One photo as the user gave it.

    Args:
        path: Where it was read.
        image: RGB, turned upright.
        captions: Texts that describe it; each names the concept by its placeholder.
        mask: Where the concept is (mode L, white), as large as the image; None if there is no mask.
    """

    path: Path
    image: Image.Image
    captions: tuple[str, ...]
    mask: Image.Image | None


@dataclass(frozen=True, kw_only=True)
class Crop:
    """One square crop of a photo.

    Args:
        pixels: In [-1, 1], shape (3, resolution, resolution).
        mask: In [0, 1], shape (1, resolution, resolution); ones for a photo without a mask.
    """

    pixels: torch.Tensor
    mask: torch.Tensor


def read_photos(folder: str | Path, concept: Concept) -> list[Photo]:
    """Read every photo of a folder with its captions and mask, in the order of the names.

    Args:
        folder: Photos (png, jpg, webp, bmp), beside them ``NAME.txt`` with one caption a line, and
            ``masks/NAME.png``. Captions and masks are optional. A photo without captions gets `TEMPLATES`.
        concept: The concept; ``<TOK>`` in a caption becomes its placeholder.

    Raises:
        TrainingDataError: Lists every file that cannot be used, and why.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TrainingDataError(f"{folder} is no folder. Expected a folder of photos ({', '.join(PHOTO_SUFFIXES)}).")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
    if not paths:
        raise TrainingDataError(f"{folder} has no photos. Expected files that end in {', '.join(PHOTO_SUFFIXES)}.")
    photos: list[Photo] = []
    defects = _stray_files(folder, paths)
    for path in paths:
        try:
            photos.append(_read_photo(path, concept))
        except TrainingDataError as error:
            defects.append(str(error))
    if defects:
        raise TrainingDataError(f"{folder} cannot be used for training: " + "; ".join(defects))
    return photos


def crop_photo(photo: Photo, resolution: int, *, generator: torch.Generator | None = None) -> Crop:
    """Scale the photo's shorter side to the resolution and crop a square.

    Args:
        photo: The photo.
        resolution: Side of the square in pixels.
        generator: Draws the crop's place; None crops at the centre.
    """
    place = (0.5, 0.5) if generator is None else tuple(torch.rand(2, generator=generator).tolist())
    size = (resolution, resolution)
    image = ImageOps.fit(photo.image, size, Image.Resampling.LANCZOS, centering=(place[0], place[1]))
    pixels = _to_tensor(image) * 2 - 1
    if photo.mask is None:
        return Crop(pixels=pixels, mask=torch.ones(1, resolution, resolution))
    mask = ImageOps.fit(photo.mask, size, Image.Resampling.BOX, centering=(place[0], place[1]))
    return Crop(pixels=pixels, mask=_to_tensor(mask))


def crops_of(photo: Photo, resolution: int, *, variants: int, center: bool, generator: torch.Generator) -> list[Crop]:
    """All crops of a photo that training will see; only one where its shape leaves no choice."""
    if center or photo.image.width == photo.image.height:
        return [crop_photo(photo, resolution)]
    return [crop_photo(photo, resolution, generator=generator) for _ in range(variants)]


def mask_on_latents(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Average a pixel mask over the cells of the latent grid.

    Args:
        mask: In [0, 1], shape (batch, 1, pixel height, pixel width).
        height: Of the latent grid, in cells.
        width: Of the latent grid, in cells.

    Returns:
        Shape (batch, 1, height, width). A mask that a crop left empty counts every cell alike.
    """
    cells = F.adaptive_avg_pool2d(mask, (height, width))
    empty = cells.amax(dim=(1, 2, 3), keepdim=True) == 0
    return torch.where(empty, torch.ones_like(cells), cells)


def _read_photo(path: Path, concept: Concept) -> Photo:
    try:
        with Image.open(path) as opened:
            image = _to_rgb(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise TrainingDataError(f"{path.name} is no readable picture ({error})") from error
    captions = _read_captions(path.with_suffix(".txt"), concept)
    mask = _read_mask(path.parent / "masks" / f"{path.stem}.png", image.size)
    return Photo(path=path, image=image, captions=captions, mask=mask)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16 bits are scaled instead of cut off, transparency becomes white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        image = Image.fromarray(np.uint8(np.clip(values / (257 if values.max() > 255 else 1), 0, 255)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _read_captions(path: Path, concept: Concept) -> tuple[str, ...]:
    if not path.exists():
        return tuple(_name_concept(template, concept) for template in TEMPLATES)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingDataError(f"{path.name} is no readable UTF-8 text ({error})") from error
    captions = tuple(_name_concept(line, concept) for line in lines if line)
    if not captions:
        raise TrainingDataError(f"{path.name} is empty; write a caption such as 'a photo of a <TOK>' or delete it")
    for caption in captions:
        try:
            split_prompt(caption, [concept])
        except ConceptError as error:
            raise TrainingDataError(f"{path.name}: {error}") from error
        if not mentions_concept(caption, [concept]):
            raise TrainingDataError(
                f"{path.name}: {caption!r} does not name the concept; write {CAPTION_SLOT} or {concept.placeholder}"
            )
    return captions


def _name_concept(text: str, concept: Concept) -> str:
    return text.replace(CAPTION_SLOT, concept.placeholder)


def _read_mask(path: Path, size: tuple[int, int]) -> Image.Image | None:
    if not path.exists():
        return None
    try:
        with Image.open(path) as opened:
            mask = _to_rgb(ImageOps.exif_transpose(opened)).convert("L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise TrainingDataError(f"masks/{path.name} is no readable picture ({error})") from error
    if abs(mask.width / mask.height / (size[0] / size[1]) - 1) > _ASPECT_TOLERANCE:
        raise TrainingDataError(
            f"masks/{path.name} is {mask.width}x{mask.height}, expected the photo's shape, {size[0]}x{size[1]}"
        )
    if mask.getextrema()[1] == 0:
        raise TrainingDataError(f"masks/{path.name} is black everywhere; white marks the concept")
    return mask.resize(size, Image.Resampling.BOX) if mask.size != size else mask


def _stray_files(folder: Path, photos: Sequence[Path]) -> list[str]:
    """Two photos of one stem would share captions; captions and masks of no photo are most likely misnamed."""
    stems = [path.stem for path in photos]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    defects = [f"several photos are called {stem!r}, so their caption and mask are ambiguous" for stem in twice]
    strays = [path for path in sorted(folder.glob("*.txt")) if path.stem not in stems]
    strays += [path for path in sorted((folder / "masks").glob("*")) if path.stem not in stems]
    defects += [f"{path.relative_to(folder)} belongs to no photo" for path in strays]
    return defects


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """Values in [0, 1], shape (channels, height, width)."""
    channels = len(image.getbands())
    values = torch.from_numpy(np.array(image)).view(image.height, image.width, channels)
    return values.permute(2, 0, 1).float() / 255
