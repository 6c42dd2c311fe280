"""Read the authors' fused models: pipelines whose tokenizer and text encoder hold the concepts' embeddings.

``new_concept_cfg.json`` beside ``model_index.json`` lists for each token of a concept, such as ``<potter1>``, its
words in the tokenizer, one for each cross-attention layer: ``{"<potter1>": {"concept_token_names":
["<new0>", ...], "concept_token_ids": [49408, ...]}, ...}``. Their rows in the text encoder are the embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.defects import list_names, raise_if_any, sanitise
from diffusers_mixofshow.edlora.reading import LONGEST_HEADER, check_file
from diffusers_mixofshow.errors import EDLoRAFormatError
from diffusers_mixofshow.interop.concept_names import Naming, group_tokens


CONCEPTS_NAME = "new_concept_cfg.json"
FIRST_WORD = "<new0>"
"""A tokenizer that knows this word most likely belongs to such a pipeline."""

_NAMES, _IDS = "concept_token_names", "concept_token_ids"


def concepts_of_fused(
    file: Path, tokenizer: Any, table: torch.Tensor, layers: tuple[str, ...], base_model: str
) -> EDLoRA:
    """Read the concepts of a fused model as a pack without updates, as these are in the model's weights.

    Args:
        file: Its ``new_concept_cfg.json``.
        tokenizer: The model's tokenizer.
        table: The text encoder's embedding table, shape (words, dim).
        layers: The U-Net's cross-attention layers in order.
        base_model: Name of the model.

    Raises:
        EDLoRAFormatError: If the file is not of this kind or does not belong to the model; lists every defect.
    """
    entries = _entries(file)
    words = {token: _words(entry) for token, entry in entries.items()}
    defects = [defect for token in entries for defect in _defects(token, entries[token], tokenizer, len(table))]
    counts = {token: len(them) for token, them in words.items() if them and len(them) != len(layers)}
    if counts:
        told = list_names(f"{sanitise(token)} {count}" for token, count in counts.items())
        defects.append(f"not one word for each of the U-Net's {len(layers)} cross-attention layers: {told}")
    raise_if_any(defects, subject=str(file), remedy="Copy the whole folder again as gradient_fusion.py wrote it.")
    found = group_tokens(entries, Naming())
    rows = {token: table[tokenizer.convert_tokens_to_ids(words[token])] for token in entries}
    return EDLoRA(
        concepts=tuple(dict.fromkeys(concept for concept, _ in found.values())),
        embeddings={found[token][1]: row.detach().cpu().clone() for token, row in rows.items()},
        lora={},
        base_model=base_model,
        layers=layers,
        training={"converted_from": "fused model of the authors' code"},
    )


def _entries(file: Path) -> dict[str, Any]:
    """Read the file: a concept's token to its entry."""
    if check_file(file) > LONGEST_HEADER:
        raise EDLoRAFormatError(f"{file} cannot be read: it is too large for a list of concepts.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EDLoRAFormatError(f"{file} cannot be read as JSON: {sanitise(str(error))}.") from error
    if not isinstance(content, dict):
        raise EDLoRAFormatError(
            f"{file} holds a {type(content).__name__}; expected an entry for each concept's token."
        )
    return content


def _words(entry: object) -> list[str]:
    """The words of a token, in the order of layers; empty if the entry does not list them."""
    names = entry.get(_NAMES) if isinstance(entry, Mapping) else None
    sound = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if sound and isinstance(names, list) else []


def _defects(token: str, entry: object, tokenizer: Any, rows: int) -> list[str]:
    """Defects of one entry."""
    words = _words(entry)
    if not words or not isinstance(entry, Mapping):
        return [f"{sanitise(token)} has no list {_NAMES!r} of words"]
    known = tokenizer.get_vocab()
    if strange := [sanitise(word) for word in words if word not in known]:
        return [f"words of {sanitise(token)} that the tokenizer does not know: {list_names(strange)}"]
    ids = [known[word] for word in words]
    if (told := entry.get(_IDS)) is not None and told != ids:
        return [f"the ids of {sanitise(token)} are not those that the tokenizer gives its words"]
    if max(ids) >= rows:
        return [f"words of {sanitise(token)} have no row in the text encoder, which has {rows}"]
    return []
