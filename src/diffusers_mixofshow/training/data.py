"""Read a folder of photos, captions and masks, and report all of its defects in one error before the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_mixofshow.concepts import SLOT, Concept, mentions_concept
from diffusers_mixofshow.errors import PictureError, TextError, TrainingDataError, warn
from diffusers_mixofshow.masks import read_alpha, read_mask
from diffusers_mixofshow.pictures import PICTURE_SUFFIXES
from diffusers_mixofshow.texts import read_text
from diffusers_mixofshow.training import inspection
from diffusers_mixofshow.training.captions import (
    TEMPLATES,
    name_concept,
    read_caption_file,
    read_description,
    shuffle_tags,
)
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.folders import Listing, join_remarks, list_folder, summarise_names
from diffusers_mixofshow.training.hub_data import fetch_data_set
from diffusers_mixofshow.training.pictures import Photo, read_visible


_ASPECT_TOLERANCE = 0.02
_KEPT = 2.0
"""A photo is kept in memory with a shorter side of this many training resolutions."""


def load_photos(config: TrainingConfig) -> list[Photo]:
    """Read the photos that a config names, from a folder or the Hub, and shuffle tags as it says.

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
        replace(photo, captions=shuffle_tags(photo.captions, config.tag_shuffles, seed=config.seed))
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
        folder: Photos in any common format, with captions from ``NAME.txt``, one a line, ``NAME.json``,
            ``metadata.jsonl`` or ``metadata.csv`` (`read_metadata`), and masks from ``masks/NAME.png`` or the photo's
            own alpha channel. Captions and masks are optional. For subfolders see `list_folder`.
        concept: The concept; ``<TOK>`` in a caption becomes its placeholder.
        resolution: Side of the training picture in pixels; if given, a warning names photos that are too small, and
            much larger ones are scaled down.
        caption_column: Column or key of captions in metadata; None ignores them.
        templates: Captions of a photo that has none.

    Warns:
        MixOfShowWarning: Once, with everything that may be a mistake: tiny photos, duplicates, unused files.

    Raises:
        ConfigurationError: If there is no such folder.
        TrainingDataError: Lists every file that cannot be used, and why, and what the warning would have said.
    """
    listing = list_folder(Path(folder), column=caption_column)
    reader = _Reader(
        listing=listing,
        concept=concept,
        column=caption_column,
        templates=tuple(templates),
        resolution=resolution,
        remarks=[],
        unlisted=[],
    )
    photos: list[Photo] = []
    defects = [*listing.defects, *reader.list_lost_captions()]
    for path in listing.photos:
        try:
            photos.append(reader.read_photo(path))
        except (TrainingDataError, PictureError, TextError) as error:
            defects.append(str(error))
    remarks = [*reader.list_remarks(), *listing.remarks, *inspection.list_duplicates(photos, listing.folder)]
    remarks += inspection.list_tiny(photos, resolution, listing.folder) if resolution else []
    if not listing.photos and not defects:
        more = f" {'; '.join(remarks)}." if remarks else ""
        raise TrainingDataError(
            f"{listing.folder} has no photos. Expected files that end in {', '.join(PICTURE_SUFFIXES)}.{more}"
        )
    if defects:
        more = f". Besides: {'; '.join(remarks)}" if remarks else ""
        raise TrainingDataError(f"{listing.folder} cannot be used for training: {'; '.join(defects)}{more}")
    if remarks:
        warn(join_remarks(f"Photos in {listing.folder}", remarks))
    return photos


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Reads the photos of one folder, and collects remarks for the warning.

    Args:
        listing: The folder's files.
        concept: Named in captions.
        column: Column or key of captions; None ignores metadata's captions.
        templates: Captions of a photo that has none.
        resolution: Side of the training picture in pixels; None keeps photos at full size.
        remarks: Collects sentences about what is unusual.
        unlisted: Collects the names of photos that the metadata file does not list.
    """

    listing: Listing
    concept: Concept
    column: str | None
    templates: tuple[str, ...]
    resolution: int | None
    remarks: list[str]
    unlisted: list[str]

    def read_photo(self, path: Path) -> Photo:
        """Read a photo with its captions and mask."""
        name = self.listing.name(path)
        if not path.is_file():
            listed = name in self.listing.metadata.captions and not path.is_symlink()
            why = f"{self.listing.metadata.file} lists {name}, which is not there"
            raise TrainingDataError(why if listed else f"{name} is a link to nothing, or no plain file")
        picture = read_visible(path, called=name)
        self.remarks.extend(picture.remarks)
        mask = self._read_mask(path, picture.image.size) or self._read_alpha_mask(picture.alpha, name)
        size = self._kept_size(picture.image.size)
        return Photo(
            path=path,
            image=_shrink(picture.image, size, Image.Resampling.LANCZOS),
            captions=self._read_captions(path, name),
            mask=None if mask is None else _shrink(mask, size, Image.Resampling.BOX),
            original_size=picture.image.size,
        )

    def list_lost_captions(self) -> list[str]:
        """List texts that belong to no photo but name the concept: most likely captions with a misspelt file name.

        Other texts that belong to no photo become a remark.
        """
        lost: list[str] = []
        strays: list[str] = []
        for path in self.listing.strays:
            try:
                text = read_text(path)
            except TextError:
                text = ""
            names_it = SLOT in text or mentions_concept(text, [self.concept])
            (lost if names_it else strays).append(self.listing.name(path))
        self.remarks.extend(summarise_names(strays, "belongs to no photo", "belong to no photo"))
        return [f"{name} belongs to no photo" for name in lost]

    def list_remarks(self) -> list[str]:
        """List all remarks, with one about photos that metadata does not list."""
        there = f"in {self.listing.metadata.file}"
        unlisted = summarise_names(
            self.unlisted,
            f"is not {there}, its captions are instance_prompt",
            f"are not {there}, their captions are instance_prompt",
        )
        return [*self.remarks, *unlisted]

    def _kept_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size to keep of a photo: twenty photos of a phone at full size would fill gigabytes of memory."""
        scale = 1.0 if self.resolution is None else _KEPT * self.resolution / min(size)
        return size if scale >= 1 else (round(size[0] * scale), round(size[1] * scale))

    def _read_captions(self, path: Path, name: str) -> tuple[str, ...]:
        metadata = self.listing.metadata
        sources = {self.listing.name(file): read_caption_file(file) for file in self.listing.captions.get(path, ())}
        if listed := metadata.captions.get(name, ()):
            sources[metadata.file] = list(listed)
        for file, texts in self._read_descriptions(path).items():
            if texts not in sources.values():  # tools that download pictures write one caption to two files
                sources[file] = texts
        if len(sources) > 1:
            raise TrainingDataError(f"{name} has captions in {' and in '.join(sources)}; keep one")
        if sources:
            ((file, texts),) = sources.items()
            return name_concept(texts, self.concept, source=f"{file}, {name}" if file == metadata.file else file)
        if metadata.file and not metadata.defects and name not in metadata.captions:
            self.unlisted.append(name)
        return name_concept(self.templates, self.concept, source="instance_prompt")

    def _read_descriptions(self, path: Path) -> dict[str, list[str]]:
        """Read captions in JSON files beside the photo, by file name."""
        found: dict[str, list[str]] = {}
        for file in self.listing.descriptions.get(path, ()):
            texts = [] if self.column is None else read_description(file, column=self.column)
            if texts:
                found[self.listing.name(file)] = texts
            elif self.column is not None:
                self.remarks.append(f"{self.listing.name(file)} has no caption and was left alone")
        return found

    def _read_mask(self, path: Path, size: tuple[int, int]) -> Image.Image | None:
        files = self.listing.masks.get(path, ())
        names = [self.listing.name(file) for file in files]
        if len(files) > 1:
            raise TrainingDataError(f"{self.listing.name(path)} has several masks ({' and '.join(names)}); keep one")
        if not files:
            return None
        (called,) = names
        mask = read_mask(files[0], called=called)
        self.remarks.extend(mask.remarks)
        height, width = mask.values.shape
        if abs(width / height / (size[0] / size[1]) - 1) > _ASPECT_TOLERANCE:
            raise TrainingDataError(f"{called} is {width}x{height}, expected the photo's shape, {size[0]}x{size[1]}")
        if not mask.values.any():
            raise TrainingDataError(f"{called} is black everywhere; white marks the concept")
        return mask.grey

    def _read_alpha_mask(self, alpha: Image.Image | None, name: str) -> Image.Image | None:
        """Read the mask from the alpha channel of a cut-out photo."""
        if alpha is None:
            return None
        if not np.asarray(alpha).any():
            self.remarks.append(f"{name} is transparent everywhere")
            return None
        mask = read_alpha(alpha, called=f"the alpha channel of {name}")
        return None if mask is None else mask.grey


def _shrink(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, resampling)
