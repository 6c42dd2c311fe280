"""A complete pipeline with a pack's updates in its weights, for programs that know nothing of ED-LoRAs."""

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
from diffusers_mixofshow.base_models import in_dtype
from diffusers_mixofshow.edlora import hub, models
from diffusers_mixofshow.edlora.low_rank import LowRank, low_rank_delta
from diffusers_mixofshow.errors import ConfigurationError, FileWriteError, HubError, MixOfShowError
from diffusers_mixofshow.families.layers import linear_layers


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


INDEX = "model_index.json"
_MARK = "_mixofshow_concepts"
"""In the pipeline's index, where diffusers overlooks names that begin with "_": an ED-LoRA file lies beside it."""


@contextmanager
def replace_pipeline(pipeline: DiffusionPipeline, folder: Path) -> Iterator[Path]:
    """Write a pipeline in float16 beside what is in a folder, and replace that when the block is done.

    The index, without which diffusers loads nothing, is deleted first and written last: a crash leaves no loadable
    mixture of two pipelines.

    Args:
        pipeline: Base model with the updates in its weights.
        folder: Created where it is missing.

    Yields:
        Where the block writes the file with the embeddings.

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
                os.replace(written, target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, MixOfShowError):
            raise
        raise FileWriteError(
            f"The pipeline cannot be written to {folder}: {error}. Make room, or choose another."
        ) from error


def mark(folder: Path) -> None:
    """Note in a pipeline's index that concepts lie beside it."""
    index = folder / INDEX
    write_whole(index, json.dumps({**json.loads(index.read_bytes()), _MARK: True}, indent=2).encode())


def _declare_float32(config: Path) -> None:
    """Have a text encoder read in float32 where no dtype is asked for, as diffusers reads all other parts.

    transformers 5 takes the dtype that stands in the file, and half of a pipeline in float16 draws nothing.
    """
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("torch_dtype", None)  # what older versions call it
    write_whole(config, json.dumps({**values, "dtype": "float32"}, indent=2).encode())


def has_concepts(
    pipeline: str | os.PathLike[str], revision: str | None = None, cache_dir: str | Path | None = None
) -> bool:
    """Whether a pipeline that was loaded, from a folder or the Hub, is a merged one with concepts beside it.

    Args:
        pipeline: Folder or Hub id; of a Hub id only the cache is asked.
        revision: What was loaded from the Hub.
        cache_dir: Where it was downloaded to.
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
    """Load the base model in float32.

    Args:
        base_model: Hub id or folder, or ``toyland``.
        pipeline_class: Class of its pipeline in diffusers.

    Raises:
        ConfigurationError: If it cannot be loaded.
        HubError: If only the Hub has it, and that cannot be reached.
    """
    import diffusers

    try:
        load = partial(getattr(diffusers, pipeline_class).from_pretrained, **in_dtype(torch.float32))
        pipeline: DiffusionPipeline = models.load_base(base_model, load)
        return pipeline
    except (ConfigurationError, HubError) as error:
        raise type(error)(
            f"{error} merged=True writes a complete pipeline and needs the base model; "
            "without it the pack alone is written."
        ) from error


@torch.no_grad()
def add_updates(pipeline: DiffusionPipeline, lora: Mapping[str, LowRank]) -> None:
    """Add every update to its layer's weight, in the weight's dtype."""
    layers = linear_layers(pipeline.components)
    for site, update in lora.items():
        weight = layers[site].weight
        weight += low_rank_delta(update, like=weight).view_as(weight)  # type: ignore[operator, arg-type]
