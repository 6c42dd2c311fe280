"""Files of a pack in its folder, and files that an earlier pack has left there."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from diffusers_mixofshow.edlora.card import list_samples
from diffusers_mixofshow.edlora.file import FILE_NAME, PLAIN_NAME
from diffusers_mixofshow.edlora.merged import INDEX, has_concepts


SOURCES = "sources"
"""Folder of a fused pack for its sources, each in a subfolder."""

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
"""Folders of a Stable Diffusion pipeline, including SDXL."""
_STATISTICS = ".statistics.safetensors"


def statistics_name(file_name: str) -> str:
    """File name of the statistics beside a LoRA: ``edlora.statistics.safetensors`` for ``edlora.safetensors``."""
    return file_name.removesuffix(".safetensors") + _STATISTICS


def find_places(folder: Path, file_name: str = FILE_NAME, *, merged: bool = False) -> list[Path]:
    """Files and folders that saving a pack would replace or make stale, without the card, which is refreshed.

    Args:
        folder: Where the pack is to be saved; may be missing.
        file_name: The pack's file.
        merged: Whether a complete pipeline is to be saved.
    """
    parts = [folder / name for name in (INDEX, *PARTS)] if merged else []
    return list(dict.fromkeys([folder / file_name, *find_beside(folder, file_name), *parts]))


def find_beside(folder: Path, file_name: str) -> list[Path]:
    """What belongs to a pack in its folder besides its file: statistics, sources, sample pictures, merged pipeline."""
    sources = [path for path in sorted(folder.glob(f"{SOURCES}/*")) if _holds_pack(path)]
    inside = [*sources, *list_samples(folder)] if _holds_pack(folder) else []
    found = [path for path in (folder / statistics_name(file_name),) if path.is_file()]
    return [*found, *inside, *find_pipeline(folder)]


def _holds_pack(folder: Path) -> bool:
    """Whether a folder holds the file of a pack, or of a plain LoRA as packs carry them."""
    return any((folder / name).exists() for name in (FILE_NAME, PLAIN_NAME))


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders, then empty ``sources`` and ``samples`` folders."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent.name in (SOURCES, "samples") and not any(path.parent.iterdir()):
            path.parent.rmdir()


def find_pipeline(folder: Path) -> list[Path]:
    """Index and component folders of a merged pipeline; empty for any other pipeline."""
    if not has_concepts(folder):
        return []
    return [folder / INDEX, *(part for name in PARTS if (part := folder / name).is_dir())]
