"""Prior preservation (arXiv:2208.12242): training on pictures of the class as well keeps the class unchanged."""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from diffusers_mixofshow.atomic import write_picture
from diffusers_mixofshow.errors import PictureError, TrainingDataError, warn
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.folders import join_remarks, list_folder, summarise_names
from diffusers_mixofshow.training.pictures import Photo, read_visible
from diffusers_mixofshow.training.samples import drawing_settings, make_plain_pipeline


_SURPLUS = "beyond num_class_images and not used"


def prompt_of_class(config: TrainingConfig) -> str:
    """The prompt of the pictures of the class."""
    return config.class_prompt or f"a photo of a {config.class_word}"


def read_class_pictures(pipeline: Any, config: TrainingConfig, *, drawing: bool) -> list[Photo]:
    """Read `num_class_images` pictures of the class; missing ones are sampled from the base model first.

    Args:
        pipeline: The base model, before training.
        config: Folder, prompt and number.
        drawing: Whether this process samples missing pictures; other processes must wait before they read.

    Raises:
        ConfigurationError: If the folder cannot be written.
        TrainingDataError: If a picture cannot be read; lists all of them.
    """
    folder = Path(str(config.class_data_dir))
    place, present = folder, 0
    if folder.is_dir():
        listing = list_folder(folder)
        place, present = listing.folder, len(listing.photos)  # they may lie in a subfolder, train
    if drawing and present < config.num_class_images:
        _draw(pipeline, config, place, missing=config.num_class_images - present)
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
    remarks += summarise_names([listing.name(path) for path in left], f"is {_SURPLUS}", f"are {_SURPLUS}")
    if remarks and not drawing:  # warn once: the trainer reads them again, without drawing, to train on them
        warn(join_remarks(f"Pictures of the class in {folder}", remarks))
    return photos


@torch.no_grad()
def _draw(pipeline: Any, config: TrainingConfig, folder: Path, missing: int) -> None:
    """Sample pictures to files with unused numbers; the number is the picture's seed."""
    stock = make_plain_pipeline(pipeline)
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
