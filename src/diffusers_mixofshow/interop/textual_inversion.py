"""Read and write textual-inversion files of A1111, diffusers, and diffusers' advanced training scripts.

A file holds one or several vectors for one word, the same for all layers. In an ED-LoRA they become tokens with equal
rows, without loss. The rows of an ED-LoRA differ, so that their mean is written, an approximation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize

from diffusers_mixofshow.atomic import write_whole
from diffusers_mixofshow.concepts import KINDS
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.defects import LONGEST_NAME, is_showable
from diffusers_mixofshow.edlora.embeddings import join_name, rows_of, split_name
from diffusers_mixofshow.edlora.header import decode
from diffusers_mixofshow.families.clip import CLIP_G, CLIP_L
from diffusers_mixofshow.families.family import POOLED
from diffusers_mixofshow.families.recognition import BASE_MODELS
from diffusers_mixofshow.interop.concept_names import UNKNOWN_CLASS, Meaning, plain_name
from diffusers_mixofshow.interop.other_kinds import other_kind
from diffusers_mixofshow.interop.tensors import to_working_dtype


Vectors = dict[str, torch.Tensor]
"""Text encoder, ``clip_l`` or ``clip_g``, to vectors of shape (vectors, dim)."""

# Names of text encoders in files: A1111 has one encoder, older scripts of diffusers number them.
_ENCODERS = {
    "clip_l": CLIP_L,
    "clip_g": CLIP_G,
    "emb_params": CLIP_L,
    "text_encoders_0": CLIP_L,
    "text_encoders_1": CLIP_G,
}
_MEANING = "mixofshow_concept"
"""Metadata key of a file that this package wrote: class word and kind of the concept, which other programs ignore."""
_A1111 = "string_to_param"
_MOST_VECTORS = 75
"""Vectors of one word; a prompt of CLIP has no room for more."""
_WORD = re.compile(r"<[^<>]+>|[^.]+")
_NO_WORDS = re.compile(
    r"lora_.*|(.*_)?(weight|bias|alpha|beta|gamma|scale|mean|std|var|variance|query|key|value|mask|proj|projection"
    r"|(embed|embedding|feature|hidden_state|state|latent|token|logit)s?)"
)
"""Names of layer weights, halves of adapters and model outputs, which are not words."""
_PARTS = {CLIP_L: "", CLIP_G: "text_encoder_2"}
"""Name of a text encoder in these files to the kind of an ED-LoRA's embeddings, see `Family.embedding_parts`."""
_WIDTHS = {width for model in BASE_MODELS for width in model.embeddings.values()}


@dataclass(frozen=True, kw_only=True)
class InversionContent:
    """Content of a textual-inversion file.

    Args:
        layout: The program whose layout the file has.
        vectors: Word to its vectors.
    """

    layout: str
    vectors: Mapping[str, Vectors]


def inversion_content(content: Any, name: str) -> InversionContent | None:
    """Read the content of a textual-inversion file; None if it is something else.

    Args:
        content: Tensors by name, as any of the programs writes them.
        name: The word if the content has none: the file's name.
    """
    if isinstance(content, torch.Tensor) and _are_words({name: content}):
        return InversionContent(layout="diffusers", vectors={plain_name(name): {CLIP_L: _rows(content)}})
    if not isinstance(content, Mapping):
        return None
    if isinstance(content.get(_A1111), Mapping):
        found = [one for one in content[_A1111].values() if _is_vectors(one)]
        if len(found) == 1:
            return InversionContent(layout="A1111", vectors={plain_name(name): {CLIP_L: _rows(found[0])}})
        return None
    tensors = {str(key): value for key, value in content.items()}
    if tensors and tensors.keys() <= _ENCODERS.keys() and all(map(_is_vectors, tensors.values())):
        layout = "A1111" if "emb_params" in tensors else "diffusers' advanced training scripts, A1111 for SDXL"
        named = {_ENCODERS[key]: _rows(value) for key, value in tensors.items()}
        return InversionContent(layout=layout, vectors={plain_name(name): named})
    if not _are_words(tensors):
        return None
    return InversionContent(layout="diffusers", vectors={key: {CLIP_L: _rows(v)} for key, v in tensors.items()})


def write_textual_inversion(
    path: Path, vectors: Mapping[str, torch.Tensor], *, word: str, meaning: Meaning | None = None
) -> Path:
    """Write one word's vectors as safetensors; the file appears whole or not at all.

    Vectors of a single text encoder are named after the word, which diffusers, A1111 and ComfyUI read; those of SDXL's
    two are named ``clip_l`` and ``clip_g``, as A1111 and ComfyUI expect and diffusers' training scripts write them;
    of such a file diffusers loads one encoder's vectors at a time. In A1111 and ComfyUI the word is the file's name.

    Args:
        path: The file; its folder is created where it is missing.
        vectors: Text encoder to its vectors, shape (vectors, dim).
        word: The word in prompts of diffusers, e.g. ``<potter>``.
        meaning: Goes into the metadata, from which `read_meaning` reads it.
    """
    named = {word: vectors[CLIP_L]} if list(vectors) == [CLIP_L] else dict(vectors)
    tensors = {name: rows.detach().cpu().contiguous().clone() for name, rows in named.items()}
    told = {} if meaning is None else {_MEANING: json.dumps(asdict(meaning))}
    write_whole(path, serialize(tensors, metadata={"format": "pt", **told}))
    return path


def read_meaning(metadata: Mapping[str, str]) -> Meaning | None:
    """Read class word and kind from a file's untrusted metadata; None if it does not tell both."""
    told = decode(metadata.get(_MEANING, ""))
    class_word, kind = (told.get("class_word"), told.get("kind")) if isinstance(told, dict) else (None, None)
    if not isinstance(class_word, str) or not isinstance(kind, str) or kind not in KINDS:
        return None
    is_word = bool(class_word.strip()) and len(class_word) <= LONGEST_NAME and is_showable(class_word)
    return Meaning(class_word, kind) if is_word else None


def find_meanings(edlora: EDLoRA) -> dict[str, Meaning]:
    """Placeholder of every concept whose class word is known to what is told of it."""
    return {
        concept.placeholder: Meaning(concept.class_word, concept.kind)
        for concept in edlora.concepts
        if concept.class_word != UNKNOWN_CLASS
    }


def mean_over_layers(embedding: torch.Tensor) -> torch.Tensor:
    """Mean of an embedding over layers, the single vector with the least mean squared error.

    Args:
        embedding: Shape (layers, dim).

    Returns:
        Shape (dim,), in the same dtype; exact for equal rows.
    """
    return embedding.double().mean(dim=0).to(embedding.dtype)


def lost_in_mean(embedding: torch.Tensor) -> float:
    """Relative error of replacing an embedding by its mean over layers: |E - mean| / |E|, from 0 to 1.

    Args:
        embedding: Shape (layers, dim).
    """
    rows = embedding.double()
    size = float(rows.norm())
    return float((rows - rows.mean(dim=0)).norm()) / size if size else 0.0


def is_layerwise(edlora: EDLoRA) -> bool:
    """Whether any token has embeddings that differ between layers."""
    return any(lost_in_mean(rows) for rows in edlora.embeddings.values())


def has_own_vector(edlora: EDLoRA) -> bool:
    """Whether any token's embedding for the pooled vector differs from the mean of its layer-wise ones."""
    parts = rows_of(edlora.embeddings, (_PARTS[CLIP_G], POOLED)).values()
    return any(not torch.equal(pooled[0], mean_over_layers(of_layers)) for of_layers, pooled in parts)


def mean_vectors(edlora: EDLoRA) -> dict[str, Vectors]:
    """Every concept's word to its tokens' means over layers, shape (tokens, dim); see `lost_in_mean` for the loss."""
    of_parts = {split_name(name)[0] for name in edlora.embeddings}
    encoders = {encoder: part for encoder, part in _PARTS.items() if part in of_parts}
    return {
        concept.placeholder: {
            encoder: torch.stack(
                [mean_over_layers(edlora.embeddings[join_name(token, part)]) for token in concept.tokens]
            )
            for encoder, part in encoders.items()
        }
        for concept in edlora.concepts
    }


def _is_vectors(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() in (1, 2) and value.numel() > 0
    )


def _are_words(tensors: Mapping[str, object]) -> bool:
    """Whether names and shapes are those of words of one text encoder, and not of other small matrices.

    A name without angle brackets is accepted only alone or beside one with brackets, if it is not a usual tensor name,
    and if its width is that of a known text encoder.
    """
    bare_ones_may_be = len(tensors) == 1 or any(name.startswith("<") for name in tensors)
    widths = set()
    for name, value in tensors.items():
        if not _is_vectors(value) or not is_showable(name) or not _WORD.fullmatch(name) or other_kind(name):
            return False
        rows = value.reshape(-1, value.shape[-1])  # type: ignore[attr-defined]
        bare = bare_ones_may_be and not _NO_WORDS.fullmatch(name.lower()) and rows.shape[1] in _WIDTHS
        if len(rows) > _MOST_VECTORS or not (name.startswith("<") or bare):
            return False
        widths.add(rows.shape[1])
    return len(widths) == 1


def _rows(value: torch.Tensor) -> torch.Tensor:
    return to_working_dtype(value.detach()).reshape(-1, value.shape[-1]).contiguous()
