"""Pictures of the class beside those of the concept, so that the class stays what it was (arXiv:2208.12242)."""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from diffusers_mixofshow.atomic import write_picture
from diffusers_mixofshow.errors import PictureError, TrainingDataError, warn
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.folders import few, list_folder, one_a_line
from diffusers_mixofshow.training.pictures import Photo, read_visible
from diffusers_mixofshow.training.samples import drawing_settings, plain_pipeline


_SURPLUS = "beyond num_class_images and not used"


def prompt_of_class(config: TrainingConfig) -> str:
    """What the pictures of the class are prompted with."""
    return config.class_prompt or f"a photo of a {config.class_word}"


def class_pictures(pipeline: Any, config: TrainingConfig, *, drawing: bool) -> list[Photo]:
    """Read the pictures of the class; what is missing to `num_class_images` is sampled from the base first.

    Args:
        pipeline: The base model, still without anything that is learnt.
        config: Folder, prompt and number.
        drawing: Whether this process samples what is missing; the others must wait for it.

    Raises:
        ConfigurationError: If the folder cannot be written.
        TrainingDataError: If a picture cannot be read; lists all of them.
    """
    folder = Path(str(config.class_data_dir))
    present = list_folder(folder).photos if folder.is_dir() else []
    if drawing and len(present) < config.num_class_images:
        _draw(pipeline, config, folder, missing=config.num_class_images - len(present))
    listing = list_folder(folder)
    used, left = listing.photos[: config.num_class_images], listing.photos[config.num_class_images :]
    photos, defects, remarks = [], list(listing.defects), list(listing.remarks)
    for path in used:
        try:
            picture = read_visible(path, called=listing.name(path))
        except PictureError as error:
            defects.append(str(error))
            continue
        remarks += picture.remarks
        photos.append(Photo(path=path, image=picture.image, captions=(prompt_of_class(config),), mask=None))
    if defects:
        raise TrainingDataError(f"{folder}: these pictures of the class cannot be read: {'; '.join(defects)}")
    remarks += few([listing.name(path) for path in left], f"is {_SURPLUS}", f"are {_SURPLUS}")
    if remarks and not drawing:  # told once, when they are read for use
        warn(one_a_line(f"Pictures of the class in {folder}", remarks))
    return photos


@torch.no_grad()
def _draw(pipeline: Any, config: TrainingConfig, folder: Path, missing: int) -> None:
    """Sample pictures under numbers that are free; each number is its picture's seed."""
    stock = plain_pipeline(pipeline)
    free = (number for number in count() if not (folder / f"class-{number:04d}.png").exists())
    drawn = list(islice(free, missing))
    for start in range(0, missing, config.train_batch_size):
        numbers = drawn[start : start + config.train_batch_size]
        images = stock(
            [prompt_of_class(config)] * len(numbers),
            **drawing_settings(pipeline, config),
            generator=[torch.Generator().manual_seed(number) for number in numbers],
        ).images
        for number, image in zip(numbers, images, strict=True):
            write_picture(folder / f"class-{number:04d}.png", image)
