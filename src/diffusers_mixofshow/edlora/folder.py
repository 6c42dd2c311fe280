"""What lies in a pack's folder beside its file, and what of that an earlier pack has left there."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from diffusers_mixofshow.edlora.file import FILE_NAME
from diffusers_mixofshow.edlora.merged import INDEX, has_concepts


SOURCES = "sources"
"""Folder in which a fused pack carries what it was made of, each in a folder of its own."""

PARTS = (
    "feature_extractor",
    "image_encoder",
    "safety_checker",
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "unet",
    "vae",
)
"""Folders of a pipeline of Stable Diffusion, XL included."""
_STATISTICS = ".statistics.safetensors"


def statistics_name(file_name: str) -> str:
    """Name of the fusion statistics beside a LoRA: ``edlora.statistics.safetensors`` beside ``edlora.safetensors``."""
    return file_name.removesuffix(".safetensors") + _STATISTICS


def places(folder: Path, file_name: str = FILE_NAME, *, merged: bool = False) -> list[Path]:
    """What a pack would replace, or make stale, of what is in a folder; the card is brought up to date instead.

    Args:
        folder: Where it is to be saved; may be missing.
        file_name: The pack's file.
        merged: Whether a complete pipeline is to be saved.
    """
    parts = [folder / name for name in (INDEX, *PARTS)] if merged else []
    return list(dict.fromkeys([folder / file_name, *beside(folder, file_name), *parts]))


def beside(folder: Path, file_name: str = FILE_NAME) -> list[Path]:
    """What belongs to the pack whose file lies in a folder: statistics, sources, sample pictures, its pipeline."""
    sources = [path for path in sorted(folder.glob(f"{SOURCES}/*")) if any(path.glob("*.safetensors"))]
    samples = sorted(path for path in folder.glob("samples/*.png") if path.stem.isdigit())
    found = [path for path in (folder / statistics_name(file_name),) if path.is_file()]
    return [*found, *sources, *samples, *pipeline(folder)]


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders, and the folders above them that are empty then."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent.name in (SOURCES, "samples") and not any(path.parent.iterdir()):
            path.parent.rmdir()


def pipeline(folder: Path) -> list[Path]:
    """The index of a merged pipeline and its parts; nothing of any other pipeline."""
    if not has_concepts(folder):
        return []
    return [folder / INDEX, *(part for name in PARTS if (part := folder / name).is_dir())]
