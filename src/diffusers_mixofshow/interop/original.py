"""The authors' checkpoints of Mix-of-Show (``edlora_model-latest.pth``), both layouts, to and from ED-LoRAs.

Either layout is a pickled dict ``{"params": {"new_concept_embedding": ..., "text_encoder": ..., "unet": ...}}`` with
embeddings of shape (layers, dim) by token. The released code names LoRA halves ``to_q.lora_down.weight``, the
research code ``to_q_lora.down.weight``, and once called the embeddings ``new_concept_token``. The scale that the
authors' code multiplies with is its alpha, 1, not alpha / rank, and it is not in the file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusers_mixofshow.atomic import write_whole
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.defects import listed
from diffusers_mixofshow.edlora.embeddings import part_and_token
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import EDLoRAFormatError
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_mixofshow.interop.lora_tensors import content_of
from diffusers_mixofshow.interop.tensors import in_working_dtype


ORIGINAL_NAME = "edlora_model-latest.pth"
"""What the authors' trainer calls its result."""

_EMBEDDINGS = ("new_concept_embedding", "new_concept_token")
_COMPONENTS = STABLE_DIFFUSION.components
_OF_LORA = re.compile(r"\.lora|_lora\.")


@dataclass(frozen=True, kw_only=True)
class OriginalContent:
    """What a checkpoint holds, sound or not.

    Args:
        tokens: Token to its layer-wise embedding, shape (layers, dim); of one row for a plain LoRA's.
        lora: Site name to update, of all layers that are sound.
        defects: What of it cannot be used.
    """

    tokens: Mapping[str, torch.Tensor]
    lora: Mapping[str, LowRank]
    defects: tuple[str, ...]


def is_original(content: object) -> bool:
    """Whether the content of a pickle has the authors' layout."""
    params = _params(content)
    return isinstance(params, Mapping) and any(key in params for key in (*_EMBEDDINGS, *_COMPONENTS))


def original_content(content: Any) -> OriginalContent:
    """Sort the content of a pickle that has the authors' layout."""
    params = _params(content)
    defects = []
    if strange := [str(key) for key in params if key not in (*_EMBEDDINGS, *_COMPONENTS)]:
        defects.append(f"entries of no known meaning: {listed(strange)}")
    tokens, misshapen = {}, []
    for token, rows in {k: v for key in _EMBEDDINGS for k, v in _mapping(params.get(key)).items()}.items():
        if isinstance(rows, torch.Tensor) and rows.dim() in (1, 2) and rows.numel() and rows.is_floating_point():
            tokens[str(token)] = in_working_dtype(rows.detach()).reshape(-1, rows.shape[-1]).contiguous()
        else:
            misshapen.append(str(token))
    if misshapen:
        defects.append(f"embeddings not of shape (layers, dim): {listed(misshapen)}")
    halves = {f"{part}.{name}": half for part in _COMPONENTS for name, half in _mapping(params.get(part)).items()}
    sound = [name for name, half in halves.items() if isinstance(half, torch.Tensor) and _OF_LORA.search(name)]
    if whole := [name for name in halves if name not in sound]:
        defects.append(f"whole weights, as of a fused model, or no tensors at all: {listed(whole)}")
    pairs = {name: halves[name].detach() for name in sound}
    found = content_of(pairs, {})
    defects += found.defects if pairs else []
    if not tokens and not pairs and not defects:
        defects.append("it holds neither embeddings nor a LoRA")
    return OriginalContent(tokens=tokens, lora=found.lora, defects=tuple(defects))


def write_original(path: Path, edlora: EDLoRA) -> Path:
    """Write an ED-LoRA as the authors' code reads it; the file appears whole or not at all.

    Its code knows no scaling but its own, so that each update's is multiplied into its ``up``, see `LowRank.folded`.

    Args:
        path: The ``.pth`` file; its folder is created where it is missing.
        edlora: What to write; names of concepts, settings and base model have no place in the layout.

    Raises:
        EDLoRAFormatError: If it has updates of another component than a text encoder and a U-Net.
    """
    others = [site for site in edlora.lora if site.partition(".")[0] not in _COMPONENTS]
    others += [name for name in edlora.embeddings if part_and_token(name)[0]]
    if others:
        raise EDLoRAFormatError(
            "The authors' layout has no place for layers and embeddings of a second text encoder or of another model: "
            f"{listed(others)}. Convert it to 'diffusers'."
        )
    params: dict[str, dict[str, torch.Tensor]] = {part: {} for part in ("new_concept_embedding", *_COMPONENTS)}
    params["new_concept_embedding"] = {token: _separate(rows) for token, rows in edlora.embeddings.items()}
    for site, update in edlora.lora.items():
        component, _, layer = site.partition(".")
        down, up = update.folded.in_file
        params[component][f"{layer}.lora_down.weight"] = _separate(down)
        params[component][f"{layer}.lora_up.weight"] = _separate(up)
    pickled = io.BytesIO()
    torch.save({"params": params}, pickled)
    write_whole(path, pickled.getvalue())
    return path


def _separate(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _params(content: Any) -> Any:
    return content.get("params", content) if isinstance(content, Mapping) else content


def _mapping(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}
