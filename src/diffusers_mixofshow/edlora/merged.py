"""Write a complete pipeline with a pack's updates in its weights, for programs without support for ED-LoRAs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from diffusers_mixofshow.atomic import write_whole
from diffusers_mixofshow.base_models import dtype_argument
from diffusers_mixofshow.edlora import hub, models
from diffusers_mixofshow.edlora.low_rank import LowRank, low_rank_delta
from diffusers_mixofshow.errors import ConfigurationError, FileWriteError, HubError, MixOfShowError
from diffusers_mixofshow.families.layers import linear_layers


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


INDEX = "model_index.json"
_MARK = "_mixofshow_concepts"
"""Key in the pipeline's index: an ED-LoRA file lies beside it. diffusers ignores keys that begin with "_"."""


@contextmanager
def replace_pipeline(pipeline: DiffusionPipeline, folder: Path) -> Iterator[Path]:
    """Write a pipeline in float16 to a temporary folder, and move it into place when the block is done.

    The index, without which diffusers loads nothing, is deleted first and written last: a crash leaves no loadable
    mixture of two pipelines.

    Args:
        pipeline: Base model with the updates in its weights.
        folder: Created where it is missing.

    Yields:
        The temporary folder, into which the block writes the file with the embeddings.

    Raises:
        FileWriteError: If there is no room or no permission.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".merged-", dir=folder) as temporary:
            pipeline.to(torch.float16).save_pretrained(temporary)
            mark(Path(temporary))
            for config in Path(temporary).glob("text_encoder*/config.json"):
                _declare_float32(config)
            yield Path(temporary)
            (folder / INDEX).unlink(missing_ok=True)
            for written in sorted(Path(temporary).iterdir(), key=lambda path: path.name == INDEX):
                target = folder / written.name
                if target.is_dir() and not target.is_symlink():
                    shutil.rmtree(target)
                elif written.is_dir():  # a folder replaces neither a file nor a link
                    target.unlink(missing_ok=True)
                os.replace(written, target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, MixOfShowError):
            raise
        raise FileWriteError(
            f"The pipeline cannot be written to {folder}: {error}. Make room, or choose another folder."
        ) from error


def mark(folder: Path) -> None:
    """Set the key in a pipeline's index that says that concepts lie beside it."""
    index = folder / INDEX
    write_whole(index, json.dumps({**json.loads(index.read_bytes()), _MARK: True}, indent=2).encode())


def _declare_float32(config: Path) -> None:
    """Make float32 a text encoder's default dtype, as it is in diffusers for all other components.

    transformers 5 uses the dtype in the configuration, and a pipeline that mixes float16 and float32 fails.
    """
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("torch_dtype", None)  # name in older versions
    write_whole(config, json.dumps({**values, "dtype": "float32"}, indent=2).encode())


def has_concepts(
    pipeline: str | os.PathLike[str], revision: str | None = None, cache_dir: str | Path | None = None
) -> bool:
    """Whether a pipeline is a merged one with concepts beside it.

    Args:
        pipeline: Folder or Hub id; for a Hub id only the cache is read.
        revision: Revision of a Hub id.
        cache_dir: The cache; by default the Hub client's.
    """
    index: Path | None = Path(pipeline) / INDEX
    if hub.is_repo_id(pipeline):
        index = hub.find_in_cache(str(pipeline), INDEX, revision=revision, cache_dir=cache_dir)
    if index is None or not index.is_file():
        return False
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get(_MARK) is True


def load_base(base_model: str, pipeline_class: str) -> DiffusionPipeline:
    """Load the base model of a merged pipeline in float32.

    Args:
        base_model: Hub id or folder, or ``toyland``.
        pipeline_class: Class of its pipeline in diffusers.

    Raises:
        ConfigurationError: If it cannot be loaded.
        HubError: If it is only on the Hub, which cannot be reached.
    """
    import diffusers

    try:
        load = partial(getattr(diffusers, pipeline_class).from_pretrained, **dtype_argument(torch.float32))
        pipeline: DiffusionPipeline = models.load_base(base_model, load)
        return pipeline
    except (ConfigurationError, HubError) as error:
        raise type(error)(
            f"{error} merged=True writes a complete pipeline and needs the base model; "
            "without merged=True only the pack is written."
        ) from error


@torch.no_grad()
def add_updates(pipeline: DiffusionPipeline, lora: Mapping[str, LowRank]) -> None:
    """Add every update to its layer's weight, in the weight's dtype."""
    layers = linear_layers(pipeline.components)
    for site, update in lora.items():
        weight = layers[site].weight
        weight += low_rank_delta(update, like=weight).view_as(weight)  # type: ignore[operator, arg-type]
