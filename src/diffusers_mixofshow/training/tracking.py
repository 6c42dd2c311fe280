"""Send curves and pictures to tensorboard or wandb, through accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available
from PIL import Image

from diffusers_mixofshow.base_models import public_name
from diffusers_mixofshow.errors import MissingExtraError
from diffusers_mixofshow.training.config import TrainingConfig


PROJECT = "mixofshow"

_IS_AVAILABLE = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}


def check_tracker(name: str | None) -> None:
    """Refuse a tracker whose package is missing.

    Raises:
        MissingExtraError: If its package is missing.
    """
    if name is not None and not _IS_AVAILABLE[name]():
        raise MissingExtraError(
            f'report_to is {name!r}, which is not installed: pip install "diffusers-mixofshow[{name}]"'
        )


@contextmanager
def track(accelerator: Accelerator, config: TrainingConfig) -> Iterator[None]:
    """Start the accelerator's trackers with all settings, and finish them after the block, also on exceptions."""
    if not accelerator.log_with:
        yield
        return
    told = config.as_record() | {"pretrained_model_name_or_path": public_name(config.pretrained_model_name_or_path)}
    plain = {name: _to_scalar(value) for name, value in told.items()}
    # wandb writes to the current folder by default, and needs an existing folder.
    folders = {"wandb": {"dir": _make_log_folder(accelerator)}} if config.report_to == "wandb" else {}
    accelerator.init_trackers(PROJECT, config=plain, init_kwargs=folders)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def _to_scalar(value: object) -> int | float | str | bool:
    """Convert a setting's value to one that every tracker accepts."""
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return value if isinstance(value, int | float | str) else str(value).lower()


def _make_log_folder(accelerator: Accelerator) -> str:
    """Make the accelerator's folder of logs and return its path."""
    folder = Path(str(accelerator.logging_dir))
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def log_picture(accelerator: Accelerator, picture: Image.Image, step: int) -> None:
    """Send a picture to every tracker that accepts pictures."""
    for tracker in accelerator.trackers:
        # tensorboard expects channels first unless dataformats is given; wandb fails on that unknown argument.
        layout: dict[str, Any] = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images"):
            tracker.log_images({"samples": np.asarray(picture)[None]}, step=step, **layout)
