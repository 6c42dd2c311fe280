"""A folder of photos, captions and masks: every defect is found, and told at once, before anything is trained."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowWarning, TrainingDataError
from diffusers_mixofshow.training import inspection
from diffusers_mixofshow.training.captions import (
    METADATA_FILES,
    TEMPLATES,
    Metadata,
    named,
    read_caption_file,
    read_metadata,
    with_shuffled_tags,
)
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.hub_data import fetch_data_set
from diffusers_mixofshow.training.pictures import PICTURE_SUFFIXES, Photo, is_picture, read_picture


MASKS = "masks"
"""Folder beside the photos that holds their masks."""

_ASPECT_TOLERANCE = 0.02
_KEPT = 2.0
"""A photo is kept with this many times the pixels of the training picture's side."""
_NO_DATA = (".md", ".toml", ".yaml", ".yml", ".json", ".ini", ".db")
"""Endings of files that may lie beside photos without being a slip."""


def load_photos(config: TrainingConfig) -> list[Photo]:
    """Read the photos that a config names, from a folder or the Hub, with tags shuffled as it says.

    Raises:
        ConfigurationError: If there is no such folder.
        TrainingDataError: Lists every file that cannot be used, and why.
        HubError: If the data set cannot be fetched.
    """
    folder = fetch_data_set(config.dataset_name) if config.dataset_name else Path(str(config.instance_data_dir))
    photos = read_photos(
        folder,
        config.concept_to_learn,
        resolution=config.resolution,
        caption_column=config.caption_column,
        templates=config.instance_prompt,
    )
    return [
        replace(photo, captions=with_shuffled_tags(photo.captions, config.tag_shuffles, seed=config.seed))
        for photo in photos
    ]


def read_photos(
    folder: str | Path,
    concept: Concept,
    *,
    resolution: int | None = None,
    caption_column: str | None = "text",
    templates: Sequence[str] = TEMPLATES,
) -> list[Photo]:
    """Read every photo of a folder with its captions and mask, in the order of the names.

    Args:
        folder: Photos in any common format, with captions from ``NAME.txt``, one a line, or from ``metadata.jsonl`` or
            ``metadata.csv`` (`read_metadata`), and masks from ``masks/NAME.png`` or the photo's own alpha channel.
            All but the photos is optional. A folder without photos but with a folder ``train`` stands for that.
        concept: The concept; ``<TOK>`` in a caption becomes its placeholder.
        resolution: Side of the training picture in pixels; with it, photos that are too small are named, and much
            larger ones are scaled down at once.
        caption_column: Where metadata has its captions; None ignores them.
        templates: Captions of a photo that has none.

    Warns:
        MixOfShowWarning: Once, for everything that looks like a slip: tiny photos, duplicates, files of no use.

    Raises:
        ConfigurationError: If there is no such folder.
        TrainingDataError: Lists every file that cannot be used, and why; what is a warning otherwise is in it, too.
    """
    folder = _folder_of_photos(Path(folder))
    metadata = read_metadata(folder, column=caption_column)
    paths = _photo_paths(folder, metadata)
    if not paths and not metadata.defects:
        raise TrainingDataError(f"{folder} has no photos. Expected files that end in {', '.join(PICTURE_SUFFIXES)}.")
    reader = _Reader(
        folder=folder,
        concept=concept,
        metadata=metadata,
        templates=tuple(templates),
        resolution=resolution,
        remarks=[],
    )
    photos: list[Photo] = []
    defects = [*metadata.defects, *_stray_files(folder, paths, metadata)]
    for path in paths:
        try:
            photos.append(reader.photo(path))
        except TrainingDataError as error:
            defects.append(str(error))
    remarks = [*reader.remarks, *_useless_files(folder), *inspection.duplicates(photos, folder)]
    remarks += inspection.tiny(photos, resolution, folder) if resolution else []
    if defects:
        more = f". Besides: {'; '.join(remarks)}" if remarks else ""
        raise TrainingDataError(f"{folder} cannot be used for training: {'; '.join(defects)}{more}")
    if remarks:
        warnings.warn(f"Photos in {folder}: {'; '.join(remarks)}.", MixOfShowWarning, stacklevel=2)
    return photos


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Reads the photos of one folder; what it notices beside defects goes to `remarks`."""

    folder: Path
    concept: Concept
    metadata: Metadata
    templates: tuple[str, ...]
    resolution: int | None
    remarks: list[str]

    def photo(self, path: Path) -> Photo:
        """A photo with its captions and mask."""
        name = path.relative_to(self.folder).as_posix()
        if not path.is_file():
            raise TrainingDataError(f"{self.metadata.file} lists {name}, which is not there")
        picture = read_picture(path, called=name)
        if picture.frames > 1:
            self.remarks.append(f"{name} has {picture.frames} frames, only the first is used")
        mask = self._mask(path, name, picture.image.size) or self._usable_alpha(picture.alpha, name)
        size = self._kept_size(picture.image.size)
        return Photo(
            path=path,
            image=_shrunk(picture.image, size, Image.Resampling.LANCZOS),
            captions=self._captions(path, name),
            mask=None if mask is None else _shrunk(mask, size, Image.Resampling.BOX),
        )

    def _kept_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The photo's size, but no more than training has a use for: twenty photos of a telephone fill gigabytes."""
        scale = 1.0 if self.resolution is None else _KEPT * self.resolution / min(size)
        return size if scale >= 1 else (round(size[0] * scale), round(size[1] * scale))

    def _captions(self, path: Path, name: str) -> tuple[str, ...]:
        file = path.with_suffix(".txt")
        listed = self.metadata.captions.get(name, ())
        if file.exists() and listed:
            raise TrainingDataError(f"{name} has captions in {file.name} and in {self.metadata.file}; keep one")
        if file.exists():
            return named(read_caption_file(file), self.concept, source=file.relative_to(self.folder).as_posix())
        if listed:
            return named(listed, self.concept, source=f"{self.metadata.file}, {name}")
        if self.metadata.file and name not in self.metadata.captions:
            self.remarks.append(f"{name} is not in {self.metadata.file}, its captions are instance_prompt")
        return named(self.templates, self.concept, source="instance_prompt")

    def _mask(self, path: Path, name: str, size: tuple[int, int]) -> Image.Image | None:
        listed = self.metadata.masks.get(name)
        files = [
            file for file in sorted((path.parent / MASKS).glob("*")) if file.stem == path.stem and is_picture(file)
        ]
        if listed is not None:
            files.append(self.folder / listed)
        if len(files) > 1:
            names = " and ".join(file.relative_to(self.folder).as_posix() for file in files)
            raise TrainingDataError(f"{name} has several masks ({names}); keep one")
        if not files:
            return None
        called = files[0].relative_to(self.folder).as_posix()
        mask = read_picture(files[0], called=called).image.convert("L")
        if abs(mask.width / mask.height / (size[0] / size[1]) - 1) > _ASPECT_TOLERANCE:
            raise TrainingDataError(
                f"{called} is {mask.width}x{mask.height}, expected the photo's shape, {size[0]}x{size[1]}"
            )
        if mask.getextrema()[1] == 0:
            raise TrainingDataError(f"{called} is black everywhere; white marks the concept")
        return mask

    def _usable_alpha(self, alpha: Image.Image | None, name: str) -> Image.Image | None:
        if alpha is not None and alpha.getextrema()[1] == 0:
            self.remarks.append(f"{name} is transparent everywhere")
            return None
        return alpha


def _shrunk(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, resampling)


def _folder_of_photos(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigurationError(
            f"{folder} is no folder. Expected a folder of photos ({', '.join(PICTURE_SUFFIXES)}); a data set of "
            "the Hub is named by dataset_name."
        )
    try:
        is_empty = not any(is_picture(path) or path.name in METADATA_FILES for path in folder.iterdir())
    except OSError as error:
        raise TrainingDataError(f"{folder} cannot be read ({error}). Check who may read it.") from error
    return folder / "train" if is_empty and (folder / "train").is_dir() else folder


def _photo_paths(folder: Path, metadata: Metadata) -> list[Path]:
    """The pictures in the folder, and those below it that metadata lists; masks are none of them."""
    masks = {folder / name for name in metadata.masks.values()}
    listed = {folder / name for name in metadata.captions}
    return sorted(({path for path in folder.iterdir() if is_picture(path)} | listed) - masks)


def _stray_files(folder: Path, photos: Sequence[Path], metadata: Metadata) -> list[str]:
    """Two photos of one stem would share captions; captions and masks of no photo are most likely misnamed."""
    stems = [path.with_suffix("") for path in photos]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    defects = [
        f"several photos are called {stem.relative_to(folder).as_posix()!r}, so their caption and mask are ambiguous"
        for stem in twice
    ]
    defects += [
        f"{path.relative_to(folder).as_posix()} belongs to no photo"
        for path in _companions(folder)
        if path.with_suffix("") not in stems and path.parent.parent / path.stem not in stems
        if path.relative_to(folder).as_posix() not in metadata.masks.values()
    ]
    return defects + [
        f"{MASKS}/{path.name} is no picture" for path in _visible(folder / MASKS) if not is_picture(path)
    ]


def _companions(folder: Path) -> list[Path]:
    """Files that belong to a photo: captions and masks."""
    return [*sorted(folder.glob("*.txt")), *_visible(folder / MASKS)]


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def _useless_files(folder: Path) -> list[str]:
    known = (*_NO_DATA, *PICTURE_SUFFIXES, ".txt")
    return [
        f"{path.name} is of no known use and was left alone"
        for path in _visible(folder)
        if path.is_file() and path.name not in (*METADATA_FILES, "LICENSE") and path.suffix.lower() not in known
    ]
