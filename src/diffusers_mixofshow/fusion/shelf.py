"""Where a fusion in stages keeps its statistics until it is done, so that an interrupted one goes on where it stopped.

Statistics that are recorded on top of what is fused already serve this one fusion alone. They are kept exactly, as
float64, in hidden files that are gone after the fusion.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.fusion.published import SourceStatistics
from diffusers_mixofshow.fusion.statistics import GramStatistics


class StageShelf:
    """Files of statistics, each under the hash of all that it depends on. A context manager.

    Args:
        fusion: What is fused and how, JSON values only; another fusion of the same sources has files of its own, so
            that both can run at a time.
    """

    def __init__(self, fusion: Mapping[str, Any]) -> None:
        """Nothing is written yet."""
        self._fusion = dict(fusion)
        self._files: list[Path] = []
        self._temporary: Path | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what could not be kept beside a source; the rest stays, unless `clear` was called."""
        self._stack.close()

    def taken_or_put(
        self,
        folder: Path | None,
        edlora: EDLoRA,
        recording: Mapping[str, Any],
        collected: Callable[[], Mapping[str, GramStatistics]],
    ) -> SourceStatistics:
        """Take statistics from the shelf, or gather them and put them there.

        Args:
            folder: Where they lie; None for a folder that does not outlive this shelf.
            edlora: What is sampled, layers that are fused already in it.
            recording: How, JSON values only.
            collected: Gathers them.

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
        gathered = SourceStatistics(
            digest=digest, base_model=edlora.base_model, recording=recording, concepts=collected()
        )
        _write(path, gathered.serialized(None, torch.float64))
        return SourceStatistics.load(path)

    def clear(self) -> None:
        """Remove all files: the fusion is done."""
        for path in self._files:
            path.unlink(missing_ok=True)

    def _own_folder(self) -> Path:
        if self._temporary is None:
            self._temporary = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fusion-")))
        return self._temporary


def _write(path: Path, content: bytes) -> None:
    """Write and rename, but do not flush to the disk: what a power cut destroys is recorded again."""
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
    """Statistics of an earlier run; None if there are none, or they cannot be read."""
    try:
        return SourceStatistics.load(path) if path.exists() else None
    except FusionError:
        return None
