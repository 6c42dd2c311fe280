"""Files that hold the statistics of a fusion in stages until it is done, so that an interrupted one can continue.

Statistics recorded on top of fused layers are of no use to any other fusion. They are stored as float64, in hidden
files that are deleted after the fusion.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import WeakFileLock

from diffusers_mixofshow.atomic import replacing
from diffusers_mixofshow.base_models import name_of
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import FileWriteError, FusionError, warn
from diffusers_mixofshow.families.layers import linear_layers
from diffusers_mixofshow.fusion.collection import FusablePipeline
from diffusers_mixofshow.fusion.published import SourceStatistics
from diffusers_mixofshow.fusion.statistics import GramStatistics


_PATIENCE = 0.1
"""Seconds until a file that is locked counts as one of another fusion."""


class StageShelf(ExitStack):
    """Files of statistics, each named by a hash of everything it depends on.

    At the end of the ``with`` block a temporary folder is deleted; other files stay for the next run, unless `clear`
    was called.

    Args:
        fusion: Settings, base and sources of the fusion, JSON values only. They are part of the hash, so that two
            fusions of the same sources can run at the same time.
    """

    def __init__(self, fusion: Mapping[str, Any]) -> None:
        """Keep the settings; nothing is written yet."""
        super().__init__()
        self._fusion = dict(fusion)
        self._files: list[Path] = []
        self._temporary: Path | None = None

    def load_or_record(
        self,
        folder: Path | None,
        edlora: EDLoRA,
        recording: Mapping[str, Any],
        record: Callable[[], Mapping[str, GramStatistics]],
    ) -> SourceStatistics:
        """Load statistics of an earlier run, or record and write them.

        Args:
            folder: Where the file is kept; None for a temporary folder.
            edlora: The sampled ED-LoRA, including layers that are already fused.
            recording: How it is sampled, JSON values only.
            record: Records the statistics.

        Raises:
            FusionError: If they hold NaN or Inf, or cannot be written; nothing is left behind then.
        """
        digest, recording = edlora.digest, {**recording, "fusion": self._fusion}
        key = hashlib.sha256(f"{digest} {json.dumps(recording, sort_keys=True)}".encode()).hexdigest()
        name = f".{key[:24]}.stage.safetensors"
        path = folder / name if folder is not None and self._claim(folder / name) else self._own_folder() / name
        self._files.append(path)
        found = _load(path)
        if found is not None and (found.digest, dict(found.recording)) == (digest, recording):
            return found
        recorded = SourceStatistics(
            digest=digest, base_model=edlora.base_model, recording=recording, concepts=record()
        )
        _write(path, recorded.to_bytes(None, torch.float64))
        return SourceStatistics.load(path)

    def clear(self) -> None:
        """Delete all files, after the fusion is done."""
        for path in self._files:
            path.unlink(missing_ok=True)

    def _claim(self, path: Path) -> bool:
        """Keep a file for this fusion alone until the block ends; False if another fusion has it.

        Raises:
            FusionError: If nothing can be written there.
        """
        if path in self._files:
            return True
        lock = path.with_suffix(".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.enter_context(WeakFileLock(lock, timeout=_PATIENCE))
        except TimeoutError:
            warn(
                f"Another fusion of the same sources is under way, which keeps its statistics in {path.parent}. This "
                "one records its own into a temporary folder, which is deleted at its end even if it is interrupted."
            )
            return False
        except OSError as error:
            raise FusionError(
                f"{path.parent} cannot be written: {error.strerror or error}. Give GradientFuser another folder, "
                "statistics='folder'."
            ) from error
        self.callback(_remove, lock)
        return True

    def _own_folder(self) -> Path:
        if self._temporary is None:
            self._temporary = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="fusion-")))
        return self._temporary


def _remove(lock: Path) -> None:
    """Remove the file of a lock that is still held, where that is allowed; on Windows releasing removes it."""
    with suppress(OSError):
        lock.unlink()


def hash_base(pipe: FusablePipeline) -> str:
    """Hash of a base model: its name, and the shapes and sums of the weights of its linear layers.

    Weights that are offloaded, or quantised in a form of their own, count by their shape alone, if they tell it.
    """
    digest = hashlib.sha256(name_of(pipe).encode())
    for site, layer in linear_layers(pipe.components).items():
        values: Any = getattr(layer.weight, "data", None)
        told = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, torch.Tensor) else ""
        known = type(values) is torch.Tensor and not values.is_meta
        digest.update(f"{site} {told} {_sum_bits(values) if known else ''}\n".encode())
    return digest.hexdigest()


def _sum_bits(values: torch.Tensor) -> int:
    """Sum of a tensor's values read as integers, which no order of additions rounds."""
    bits: torch.dtype = getattr(torch, f"int{8 * values.dtype.itemsize}")
    return int(values.contiguous().view(bits).sum(dtype=torch.int64))


def _write(path: Path, content: bytes) -> None:
    """Write without flushing, which is slow here; after a power cut the file is recorded again."""
    try:
        with replacing(path, flush=False) as unfinished:
            unfinished.write_bytes(content)
    except FileWriteError as error:
        raise FusionError(
            f"{error} Statistics of a fusion in stages need {len(content) // 2**20} MiB there, or in another folder "
            "that you give GradientFuser as statistics=."
        ) from error


def _load(path: Path) -> SourceStatistics | None:
    """Load statistics of an earlier run; None if there are none, or they cannot be read."""
    try:
        return SourceStatistics.load(path) if path.exists() else None
    except FusionError:
        return None
