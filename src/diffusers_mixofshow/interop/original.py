"""Convert the authors' checkpoints of Mix-of-Show (``edlora_model-latest.pth``), both layouts, to and from ED-LoRAs.

Either layout is a pickled dict ``{"params": {"new_concept_embedding": ..., "text_encoder": ..., "unet": ...}}`` with
embeddings of shape (layers, dim) by token. The released code names LoRA halves ``to_q.lora_down.weight``, the
research code ``to_q_lora.down.weight``, and once called the embeddings ``new_concept_token``. The authors'
code scales updates by its alpha, 1, not by alpha / rank, and alpha is not in the file.
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
from diffusers_mixofshow.edlora.defects import is_showable, list_names
from diffusers_mixofshow.edlora.embeddings import split_name
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import EDLoRAFormatError
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_mixofshow.interop.lora_tensors import content_of
from diffusers_mixofshow.interop.tensors import to_working_dtype


ORIGINAL_NAME = "edlora_model-latest.pth"
"""File name of the authors' trainer."""

_EMBEDDINGS = ("new_concept_embedding", "new_concept_token")
_COMPONENTS = STABLE_DIFFUSION.components
_OF_LORA = re.compile(r"\.lora|_lora\.")


@dataclass(frozen=True, kw_only=True)
class OriginalContent:
    """Content of a checkpoint, including its defects.

    Args:
        tokens: Token to its layer-wise embedding, shape (layers, dim); (1, dim) in a plain LoRA.
        lora: Site name to update, for all valid layers.
        defects: Why parts of it cannot be used.
    """

    tokens: Mapping[str, torch.Tensor]
    lora: Mapping[str, LowRank]
    defects: tuple[str, ...]


def is_original(content: object) -> bool:
    """Whether the content of a pickle has the authors' layout."""
    params = _params(content)
    return isinstance(params, Mapping) and any(key in params for key in (*_EMBEDDINGS, *_COMPONENTS))


def original_content(content: Any) -> OriginalContent:
    """Convert the content of a pickle that has the authors' layout."""
    params = _params(content)
    defects = []
    if strange := [str(key) for key in params if key not in (*_EMBEDDINGS, *_COMPONENTS)]:
        defects.append(f"unknown entries: {list_names(strange)}")
    tokens, misshapen, odd = {}, [], []
    for token, rows in {k: v for key in _EMBEDDINGS for k, v in _mapping(params.get(key)).items()}.items():
        if not is_showable(str(token)):
            odd.append(str(token))
        elif isinstance(rows, torch.Tensor) and rows.dim() in (1, 2) and rows.numel() and rows.is_floating_point():
            tokens[str(token)] = to_working_dtype(rows.detach()).reshape(-1, rows.shape[-1]).contiguous()
        else:
            misshapen.append(str(token))
    if odd:
        defects.append(f"tokens with control characters: {list_names(odd)}")
    if misshapen:
        defects.append(f"embeddings not of shape (layers, dim): {list_names(misshapen)}")
    halves = {f"{part}.{name}": half for part in _COMPONENTS for name, half in _mapping(params.get(part)).items()}
    sound = [name for name, half in halves.items() if isinstance(half, torch.Tensor) and _OF_LORA.search(name)]
    if whole := [name for name in halves if name not in sound]:
        defects.append(f"full weights, as of a fused model, or not tensors: {list_names(whole)}")
    pairs = {name: halves[name].detach() for name in sound}
    found = content_of(pairs, {})
    defects += found.defects if pairs else []
    if not tokens and not pairs and not defects:
        defects.append("it holds neither embeddings nor a LoRA")
    return OriginalContent(tokens=tokens, lora=found.lora, defects=tuple(defects))


def write_original(path: Path, edlora: EDLoRA) -> Path:
    """Write an ED-LoRA in the authors' layout; the file appears whole or not at all.

    The layout has no scaling, so each update's is multiplied into its ``up``, see `LowRank.folded`.

    Args:
        path: The ``.pth`` file; its folder is created where it is missing.
        edlora: What to write; the layout cannot hold names of concepts, settings and base model.

    Raises:
        EDLoRAFormatError: If it has updates of other components than one text encoder and the U-Net.
    """
    others = [site for site in edlora.lora if site.partition(".")[0] not in _COMPONENTS]
    others += [name for name in edlora.embeddings if split_name(name)[0]]
    if others:
        raise EDLoRAFormatError(
            "The authors' layout cannot hold layers and embeddings of a second text encoder or of another model: "
            f"{list_names(others)}. Convert it to 'diffusers'."
        )
    params: dict[str, dict[str, torch.Tensor]] = {part: {} for part in ("new_concept_embedding", *_COMPONENTS)}
    params["new_concept_embedding"] = {token: _copy(rows) for token, rows in edlora.embeddings.items()}
    for site, update in edlora.lora.items():
        component, _, layer = site.partition(".")
        down, up = update.folded.in_file
        params[component][f"{layer}.lora_down.weight"] = _copy(down)
        params[component][f"{layer}.lora_up.weight"] = _copy(up)
    pickled = io.BytesIO()
    torch.save({"params": params}, pickled)
    write_whole(path, pickled.getvalue())
    return path


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _params(content: Any) -> Any:
    return content.get("params", content) if isinstance(content, Mapping) else content


def _mapping(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}
