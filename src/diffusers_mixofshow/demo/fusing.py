"""Stage three of the demo: fuse all concepts into one, by an average of their weights and by gradient fusion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers_mixofshow.demo.settings import DemoSettings
from diffusers_mixofshow.edlora.file import FILE_NAME
from diffusers_mixofshow.evaluation.prompts import RECORDING_PROMPTS
from diffusers_mixofshow.fusion import GradientFuser
from diffusers_mixofshow.fusion.fuser import Method


METHODS: dict[str, Method] = {"average": "average", "fused": "closed-form"}
"""Folder of each pack in the demo's folder, and the method that it is fused by."""
_BATCH = 8


def fuse_all(
    pipe: Any, singles: Sequence[Path], settings: DemoSettings, advance: Callable[[], object]
) -> dict[str, Path]:
    """Fuse ED-LoRAs by each of `METHODS`, of which `advance` is told; return the name and the folder of each pack.

    A folder that holds the result of the same ED-LoRAs and the same settings stays as it is.
    """
    packs = {}
    for name, method in METHODS.items():
        packs[name] = settings.folder / name
        _fuse(pipe, singles, method, packs[name], settings)
        advance()
    return packs


def _fuse(pipe: Any, singles: Sequence[Path], method: Method, folder: Path, settings: DemoSettings) -> None:
    arguments: dict[str, Any] = {
        "prompts": RECORDING_PROMPTS,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "batch_size": _BATCH,
    } | dict(settings.fusion)
    digest = hashlib.sha256(json.dumps([method, arguments], sort_keys=True).encode())
    for single in singles:
        digest.update((single / FILE_NAME).read_bytes())
    marker = folder / "finished.json"
    if marker.exists() and marker.read_text(encoding="utf-8") == digest.hexdigest():
        return
    marker.unlink(missing_ok=True)
    fused = GradientFuser(pipe, **arguments).fuse([str(single) for single in singles], method=method)
    fused.save_pretrained(folder, overwrite=True)
    marker.write_text(digest.hexdigest(), encoding="utf-8")
