"""Check the arguments of `load_edlora`, and open what it and `from_pretrained` load into a pipeline."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_mixofshow.edlora import EDLoRA, hub
from diffusers_mixofshow.edlora.merged import has_concepts
from diffusers_mixofshow.errors import ConfigurationError, EDLoRANotFoundError
from diffusers_mixofshow.families.layers import embedding_layers
from diffusers_mixofshow.interop.fused_folder import CONCEPTS_NAME, FIRST_WORD, concepts_of_fused
from diffusers_mixofshow.interop.opening import open_edlora


_WHERE = ("revision", "subfolder", "weight_name", "token", "cache_dir", "local_files_only")


def check_arguments(source: Any, scale: Any, adapter_name: Any, where: Mapping[str, Any]) -> tuple[float, str]:
    """Check the arguments of `load_edlora`; a text in the place of the scale is the adapter's name.

    Args:
        source: Hub id, folder or file, or an ED-LoRA itself.
        scale: Strength of the weight updates.
        adapter_name: The name that the user gave.
        where: Arguments that say where to look on the Hub or in a folder.

    Returns:
        The scale, and the adapter's name or an empty text.

    Raises:
        ConfigurationError: If arguments have wrong types or unknown names; names all of them.
    """
    if isinstance(scale, str) and adapter_name is None and not _is_number(scale):
        scale, adapter_name = 1.0, scale
    defects = []
    if not isinstance(source, str | os.PathLike | EDLoRA):
        defects.append(
            f"the source is {_format(source)}; expected a Hub id, a folder, a file or an EDLoRA, one in each call"
        )
    if not _is_scale(scale):
        defects.append(f"scale is {_format(scale)}; expected a number such as 0.8")
    if not isinstance(adapter_name, str | None):
        defects.append(f"adapter_name is {_format(adapter_name)}; expected a text")
    if strange := [name for name in where if name not in _WHERE]:
        defects.append(f"there is no argument {', '.join(strange)}; expected scale, adapter_name, {', '.join(_WHERE)}")
    if defects:
        raise ConfigurationError(f"load_edlora: {'; '.join(defects)}.")
    return float(scale), adapter_name or ""


def open_source(
    source: str | os.PathLike[str] | EDLoRA,
    adapter_name: str,
    components: Mapping[str, object],
    where: Mapping[str, Any],
) -> tuple[EDLoRA, str]:
    """Open the ED-LoRA for ``pipeline.components``, and choose its adapter's name; see `check_arguments`."""
    if isinstance(source, EDLoRA):
        return source, adapter_name or _make_adapter_name(source, "lora")
    found = open_edlora(source, layers=embedding_layers(components), **where)
    found.tell()
    return found.edlora, adapter_name or _make_adapter_name(found.edlora, found.file.stem)


def read_own_concepts(
    pipeline: str | os.PathLike[str], components: Mapping[str, Any], options: Mapping[str, Any]
) -> EDLoRA | None:
    """Read the concepts whose updates are in a pipeline's weights; None where there are none.

    Args:
        pipeline: Folder or Hub id of the pipeline.
        components: ``pipeline.components``.
        options: Hub arguments with which the pipeline was loaded.

    Raises:
        EDLoRAFormatError: If the concepts' file is defective or does not belong to the pipeline.
    """
    if has_concepts(pipeline, options.get("revision"), options.get("cache_dir")):
        return EDLoRA.from_pretrained(pipeline, **options)
    tokenizer, text_encoder = components.get("tokenizer"), components.get("text_encoder")
    if tokenizer is None or text_encoder is None:
        return None
    file = _find_fused_concepts(pipeline, tokenizer, options)
    if file is None:
        return None
    table = text_encoder.get_input_embeddings().weight
    name = str(pipeline) if hub.is_repo_id(pipeline) else Path(pipeline).resolve().name
    found = concepts_of_fused(file, tokenizer, table, embedding_layers(components), name)
    return found if found.concepts else None  # without concepts: a model fused from plain LoRAs


def has_own_concepts(base: str) -> bool:
    """Whether a base model has concepts of its own in its weights; for a Hub id only the cache is searched."""
    if has_concepts(base):
        return True
    return (
        bool(hub.find_in_cache(base, CONCEPTS_NAME, revision=None, cache_dir=None))
        if hub.is_repo_id(base)
        else Path(base, CONCEPTS_NAME).is_file()
    )


def _find_fused_concepts(pipeline: str | os.PathLike[str], tokenizer: Any, options: Mapping[str, Any]) -> Path | None:
    """The file that lists the concepts of a model which the authors' code fused; None for any other model."""
    if not hub.is_repo_id(pipeline):
        file = Path(pipeline, CONCEPTS_NAME)
        return file if file.is_file() else None
    if FIRST_WORD not in tokenizer.get_added_vocab():  # no such model: saves a request to the Hub
        return None
    try:
        return hub.download(str(pipeline), CONCEPTS_NAME, **options)
    except EDLoRANotFoundError:
        return None


def _make_adapter_name(edlora: EDLoRA, default: str) -> str:
    """Join the concepts' names to one that PEFT accepts: letters, digits, '_' and '-'."""
    return re.sub(r"[^\w-]", "_", "_".join(concept.name for concept in edlora.concepts) or default)


def _is_scale(value: Any) -> bool:
    if isinstance(value, bool | str | bytes | None):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError):
        return False


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _format(value: Any) -> str:
    """Format a value for an error: short texts and numbers as they are, of anything else the type."""
    simple = isinstance(value, str | int | float | None)
    return f"{str(value)[:80]!r}" if isinstance(value, str) else str(value) if simple else f"a {type(value).__name__}"
