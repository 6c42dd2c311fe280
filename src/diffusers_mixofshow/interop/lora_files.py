"""Plain LoRA files of other programs: diffusers (old and new names), PEFT, ComfyUI, and kohya / A1111."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffusers_mixofshow.atomic import replacing
from diffusers_mixofshow.edlora import stock
from diffusers_mixofshow.edlora.defects import listed, raise_if_any
from diffusers_mixofshow.edlora.low_rank import LowRank, input_widths
from diffusers_mixofshow.errors import EDLoRAFormatError, warn
from diffusers_mixofshow.families import Family
from diffusers_mixofshow.families.recognition import recognise, transformers_with
from diffusers_mixofshow.interop.lora_tensors import LoRAContent, content_of
from diffusers_mixofshow.interop.names import kohya_name, shared_name
from diffusers_mixofshow.interop.original_code import Joined, in_original_code
from diffusers_mixofshow.interop.tensors import PICKLES, load_safetensors


PLAIN_NAME = "pytorch_lora_weights.safetensors"
"""What `load_lora_weights` of diffusers looks for in a folder."""

EMBEDDINGS = "embeddings"
"""Folder of textual-inversion files beside a LoRA file, named as A1111 and ComfyUI name theirs."""

_COMPANIONS = "mixofshow_embeddings"
"""In a LoRA file's metadata: the words whose embeddings were written beside it."""
_MOST_COMPANIONS = 1000


def read_lora(path: Path) -> dict[str, LowRank]:
    """Read a plain LoRA file.

    Args:
        path: A safetensors file; pickles are not read.

    Returns:
        Site name (see `families.family`) to its update; 1 x 1 convolutions as matrices.

    Raises:
        EDLoRANotFoundError: If there is no such file.
        EDLoRAFormatError: If it is no LoRA, or holds what no low-rank update of a linear layer can say; names all.

    Warns:
        MixOfShowWarning: What had to be assumed of it.
    """
    content = lora_content(path)
    bundled = f"it bundles embeddings, which are no part of a plain LoRA: {listed(content.bundled)}"
    raise_if_any(
        [*content.defects, *([bundled] if content.bundled else [])],
        subject=str(path),
        remedy="Expected a LoRA of a supported base in the names of diffusers, PEFT, kohya or the base's own code.",
    )
    for remark in content.remarks:
        warn(f"{path}: {remark}.")
    return dict(content.lora)


def lora_content(path: Path) -> LoRAContent:
    """Read a LoRA file, and note what of it cannot be used instead of raising.

    Raises:
        EDLoRANotFoundError: If there is no such file.
        EDLoRAFormatError: If it is no safetensors file.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise EDLoRAFormatError(f"{path}: pickles are not read as LoRAs. Convert it to safetensors first.")
    metadata, tensors = load_safetensors(path)
    return content_of(tensors, metadata, path)


def companions(metadata: Mapping[str, str]) -> list[str]:
    """The words whose embeddings were written beside a LoRA file of ours; none of any other file."""
    words = _json_object(metadata.get(_COMPANIONS, "{}")).get("words")
    return [word for word in words[:_MOST_COMPANIONS] if isinstance(word, str)] if isinstance(words, list) else []


def announcing(words: Iterable[str]) -> dict[str, str]:
    """The metadata of a LoRA file beside which these words' embeddings are written."""
    named = list(words)
    return {_COMPANIONS: json.dumps({"words": named})} if named else {}


def write_lora(path: Path, lora: Mapping[str, LowRank], metadata: Mapping[str, str] | None = None) -> Path:
    """Write an ordinary LoRA file in PEFT's names, which diffusers loads; it appears whole or not at all.

    Args:
        path: The file; its folder is created where it is missing.
        lora: Site name to update.
        metadata: Further entries of the file's header.
    """
    tensors: dict[str, torch.Tensor] = {}
    for site, update in lora.items():
        tensors[f"{site}.lora_A.weight"], tensors[f"{site}.lora_B.weight"] = update.in_file
    return _write(path, tensors, {**(metadata or {}), **stock.adapter_metadata(lora)})


def write_kohya(
    path: Path, lora: Mapping[str, LowRank], metadata: Mapping[str, str] | None = None, *, base_model: str = ""
) -> Path:
    """Write a LoRA file in kohya's names, which A1111, ComfyUI and diffusers load; it appears whole or not at all.

    That of a transformer is written in names that ComfyUI and diffusers both know, which are kohya's for some bases
    (`Family.shared_names`), with the scaling multiplied into each ``up``.

    Of a U-Net every layer has the same alpha: diffusers takes one for many where they differ. Where they do, each
    layer's scaling is multiplied into its ``up`` (see `LowRank.folded`); where ranks differ as well, no layer has an
    alpha, which all programs read as a scale of 1. The text encoder's layers keep ``text_model`` in their names, and
    those of SDXL's two are numbered, whatever transformers calls them.

    Args:
        path: The file; its folder is created where it is missing.
        lora: Site name to update.
        metadata: Further entries of the file's header.
        base_model: The base model's id, where its layers alone do not tell of which transformer they are.

    Raises:
        EDLoRAFormatError: If nothing tells which transformer it is for, or layers have shapes that its have not.
    """
    if family := transformer_of(lora, base_model):
        return _write_for_transformer(path, lora, metadata or {}, family)
    base = recognise(input_widths(lora))
    xl = base is not None and base.has_two_text_encoders
    lora = _scaled_alike(lora)
    ranks, alphas = {update.rank for update in lora.values()}, {update.alpha for update in lora.values()}
    alpha = alphas.pop() if len(alphas) == 1 else None
    tensors: dict[str, torch.Tensor] = {}
    for site, update in lora.items():
        name = kohya_name(site, several_text_encoders=xl, ldm=xl)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = update.in_file
        if alpha is not None:
            tensors[f"{name}.alpha"] = _scalar(alpha)
    told = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alpha:g}" if alpha is not None else "Dynamic",
    }
    if base is not None:
        told["ss_base_model_version"] = base.kohya
    if alpha is None:  # diffusers takes this header or alphas, never both
        told |= stock.adapter_metadata(lora)
    return _write(path, tensors, {**(metadata or {}), **told})


def transformer_of(lora: Mapping[str, LowRank], base_model: str) -> Family | None:
    """The family of transformers that a LoRA is for; None of a U-Net's, or of one for text encoders alone.

    Raises:
        EDLoRAFormatError: If it may be one of several, and the base model tells none.
    """
    families = transformers_with(input_widths(lora), base_model)
    if len(families) > 1:
        raise EDLoRAFormatError(
            f"Its layers may be those of {', '.join(family.name for family in families)}, and other programs' names "
            f"depend on that. Name the base model, such as {families[0].models[0].id!r}: base_model=..., or --base."
        )
    return families[0] if families else None


def _write_for_transformer(
    path: Path, lora: Mapping[str, LowRank], metadata: Mapping[str, str], family: Family
) -> Path:
    folded = {site: update.folded for site, update in lora.items()}
    of_kohya = family.shared_names.startswith("lora_")
    joined = (
        in_original_code(family, folded, taken_apart=of_kohya)
        if "{original}" in family.shared_names
        else Joined(lora=folded, ranks={site: update.rank for site, update in folded.items()})
    )
    halves = ("lora_down", "lora_up") if of_kohya else ("lora_A", "lora_B")
    tensors: dict[str, torch.Tensor] = {}
    for layer, update in joined.lora.items():
        name = shared_name(family, layer)
        for half, factor in zip(halves, update.in_file, strict=True):
            tensors[f"{name}.{half}.weight"] = factor
    told = {"ss_base_model_version": family.models[0].kohya}
    return _write(path, tensors, {**metadata, **told, **stock.metadata_of_ranks(joined.ranks)})


def _scaled_alike(lora: Mapping[str, LowRank]) -> Mapping[str, LowRank]:
    """The same updates as they are, if they share one alpha, and otherwise without any scaling but their own `up`."""
    alphas = {update.alpha for update in lora.values()}
    # kohya's own loader takes an alpha of 0 for none.
    return lora if len(alphas) == 1 and 0 not in alphas else {site: update.folded for site, update in lora.items()}


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    with replacing(path) as temporary:
        try:
            save_file(_separate(tensors), temporary, metadata={**metadata, "format": "pt"})
        except SafetensorError as error:  # of the disk: what is written is sound
            raise OSError(str(error)) from error
    return path


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without shared memory: sources of a fused pack share factors, which safetensors refuses to write."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.contiguous()
        place = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if place in seen else plain
        seen.add(place)
    return separate


def _scalar(alpha: float) -> torch.Tensor:
    """An alpha as kohya's files hold it; in double precision where single would change it."""
    exact = torch.tensor(alpha, dtype=torch.float64)
    return exact.float() if float(exact.float()) == alpha else exact


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
