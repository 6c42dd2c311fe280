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

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.fusion.published import SourceStatistics
from diffusers_mixofshow.fusion.statistics import GramStatistics


class StageShelf(ExitStack):
    """Files of statistics, each named by a hash of everything it depends on.

    At the end of the ``with`` block a temporary folder is deleted; other files stay for the next run, unless `clear`
    was called.

    Args:
        fusion: Settings and sources of the fusion, JSON values only. They are part of the hash, so that two fusions
            of the same sources can run at the same time.
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
        path = (folder or self._own_folder()) / f".{key[:24]}.stage.safetensors"
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

    def _own_folder(self) -> Path:
        if self._temporary is None:
            self._temporary = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="fusion-")))
        return self._temporary


def _write(path: Path, content: bytes) -> None:
    """Write and rename without fsync, which is slow here; after a power cut the file is recorded again."""
    unfinished = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        unfinished.rename(path)
    except OSError as error:
        raise FusionError(
            f"{path} cannot be written: {error.strerror or error}. Statistics of a fusion in stages need "
            f"{len(content) // 2**20} MiB there; make room, or give GradientFuser another folder as statistics=."
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def _load(path: Path) -> SourceStatistics | None:
    """Load statistics of an earlier run; None if there are none, or they cannot be read."""
    try:
        return SourceStatistics.load(path) if path.exists() else None
    except FusionError:
        return None
