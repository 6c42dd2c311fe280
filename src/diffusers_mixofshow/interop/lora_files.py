"""Read and write plain LoRA files of other programs: diffusers (old and new names), PEFT, ComfyUI, kohya / A1111."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffusers_mixofshow.atomic import replacing
from diffusers_mixofshow.edlora import stock
from diffusers_mixofshow.edlora.defects import list_names, raise_if_any
from diffusers_mixofshow.edlora.fusion_record import as_mapping
from diffusers_mixofshow.edlora.header import decode
from diffusers_mixofshow.edlora.low_rank import LowRank, input_widths
from diffusers_mixofshow.edlora.reading import PREFIX
from diffusers_mixofshow.errors import EDLoRAFormatError, warn
from diffusers_mixofshow.families import Family
from diffusers_mixofshow.families.recognition import recognise, transformers_with
from diffusers_mixofshow.interop.lora_tensors import LoRAContent, content_of
from diffusers_mixofshow.interop.names import kohya_name, shared_name
from diffusers_mixofshow.interop.original_code import Joined, to_original_code
from diffusers_mixofshow.interop.tensors import PICKLES, load_safetensors


EMBEDDINGS = "embeddings"
"""Folder of textual-inversion files beside a LoRA file, named as in A1111 and ComfyUI."""

_COMPANIONS = "mixofshow_embeddings"
"""Metadata key of a LoRA file: the words whose embeddings were written beside it."""
_MOST_COMPANIONS = 1000

_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of dtypes in the header of a safetensors file."""


def read_lora(path: Path) -> dict[str, LowRank]:
    """Read a plain LoRA file.

    Args:
        path: A safetensors file; pickles are not read.

    Returns:
        Site name (see `families.family`) to its update; 1 x 1 convolutions as matrices.

    Raises:
        EDLoRANotFoundError: If there is no such file.
        EDLoRAFormatError: If it is not a LoRA, or holds anything but low-rank updates of linear layers; lists every
            defect.

    Warns:
        MixOfShowWarning: Of assumptions about it.
    """
    content = lora_content(path)
    bundled = f"it bundles embeddings, which a plain LoRA does not have: {list_names(content.bundled)}"
    raise_if_any(
        [*content.defects, *([bundled] if content.bundled else [])],
        subject=str(path),
        remedy="Expected a LoRA of a supported base in the names of diffusers, PEFT, kohya or the base's own code.",
    )
    for remark in content.remarks:
        warn(f"{path}: {remark}.")
    return dict(content.lora)


def lora_content(path: Path) -> LoRAContent:
    """Read a LoRA file; its defects are listed in the result instead of raised.

    Raises:
        EDLoRANotFoundError: If there is no such file.
        EDLoRAFormatError: If it is not a safetensors file.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise EDLoRAFormatError(f"{path}: pickles are not read as LoRAs. Convert it to safetensors first.")
    metadata, tensors = load_safetensors(path)
    return content_of(tensors, metadata, path)


def list_companions(metadata: Mapping[str, str]) -> list[str]:
    """Words whose embeddings this package wrote beside a LoRA file; empty for other files."""
    words = as_mapping(decode(metadata.get(_COMPANIONS, ""))).get("words")
    return [word for word in words[:_MOST_COMPANIONS] if isinstance(word, str)] if isinstance(words, list) else []


def companions_metadata(words: Iterable[str]) -> dict[str, str]:
    """Metadata that lists the words whose embeddings are written beside a LoRA file."""
    listed_words = list(words)
    return {_COMPANIONS: json.dumps({"words": listed_words})} if listed_words else {}


def write_lora(
    path: Path,
    lora: Mapping[str, LowRank],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a plain LoRA file in PEFT's names, which diffusers loads; it appears whole or not at all.

    Args:
        path: The file; its folder is created where it is missing.
        lora: Site name to update.
        metadata: Further entries of the file's header.
        dtype: Dtype of the file, see `LowRank.cast`; by default that of each tensor. Updates are cast one at a time.
    """
    entries: dict[str, object] = {"__metadata__": {**(metadata or {}), **stock.adapter_metadata(lora), "format": "pt"}}
    sites, end = sorted(lora, key=lambda site: (-lora[site].down.dtype.itemsize, site)), 0  # so that all are aligned
    for site in sites:
        for half, tensor in zip("AB", lora[site].in_file, strict=True):
            kind = tensor.dtype if dtype is None else dtype
            start, end = end, end + kind.itemsize * tensor.numel()
            entry = {"dtype": _KINDS[kind], "shape": tensor.shape, "data_offsets": (start, end)}
            entries[f"{site}.lora_{half}.weight"] = entry
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % PREFIX)  # the data stays aligned
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(PREFIX, "little") + header)
        for site in sites:
            for tensor in (lora[site] if dtype is None else lora[site].cast(dtype)).in_file:
                file.write(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return path


def write_kohya(
    path: Path, lora: Mapping[str, LowRank], metadata: Mapping[str, str] | None = None, *, base_model: str = ""
) -> Path:
    """Write a LoRA file in kohya's names, which A1111, ComfyUI and diffusers load; it appears whole or not at all.

    A LoRA of a transformer is written in names that both ComfyUI and diffusers load (`Family.shared_names`), kohya's
    for some bases, with the scaling multiplied into each ``up``.

    For a U-Net, all layers get the same alpha, because diffusers applies one layer's alpha to many. If alphas differ,
    each layer's scaling is multiplied into its ``up`` (see `LowRank.folded`); if ranks differ as well, no alpha is
    written, which all programs read as a scale of 1. Names of text encoder layers keep ``text_model``, and those of
    SDXL's two encoders are numbered, independent of the transformers version.

    Args:
        path: The file; its folder is created where it is missing.
        lora: Site name to update.
        metadata: Further entries of the file's header.
        base_model: The base model's id, for transformers that cannot be recognised by their layers alone.

    Raises:
        EDLoRAFormatError: If the transformer cannot be recognised, or layers do not have its shapes.
    """
    if family := transformer_of(lora, base_model):
        return _write_for_transformer(path, lora, metadata or {}, family)
    base = recognise(input_widths(lora))
    xl = base is not None and base.has_two_text_encoders
    lora = _equalise_alphas(lora)
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
    if alpha is None:  # diffusers accepts either this header or alphas, not both
        told |= stock.adapter_metadata(lora)
    return _write(path, tensors, {**(metadata or {}), **told})


def transformer_of(lora: Mapping[str, LowRank], base_model: str) -> Family | None:
    """The transformer family that a LoRA is for; None for a U-Net, or for text encoders alone.

    Raises:
        EDLoRAFormatError: If several families match and the base model does not decide.
    """
    families = transformers_with(input_widths(lora), base_model)
    if len(families) > 1:
        raise EDLoRAFormatError(
            f"Its layers may belong to {', '.join(family.name for family in families)}, and other programs' names "
            f"depend on that. Give the base model, such as {families[0].models[0].id!r}: base_model=..., or --base."
        )
    return families[0] if families else None


def _write_for_transformer(
    path: Path, lora: Mapping[str, LowRank], metadata: Mapping[str, str], family: Family
) -> Path:
    folded = {site: update.folded for site, update in lora.items()}
    of_kohya = family.shared_names.startswith("lora_")
    joined = (
        to_original_code(family, folded, taken_apart=of_kohya)
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
    shapes = {site: (rank, float(rank)) for site, rank in joined.ranks.items()}
    return _write(path, tensors, {**metadata, **told, **stock.metadata_of(shapes)})


def _equalise_alphas(lora: Mapping[str, LowRank]) -> Mapping[str, LowRank]:
    """Updates with equal alphas: unchanged if they are equal, otherwise with the scaling multiplied into `up`."""
    alphas = {update.alpha for update in lora.values()}
    # kohya's loader treats an alpha of 0 as missing.
    return lora if len(alphas) == 1 and 0 not in alphas else {site: update.folded for site, update in lora.items()}


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    with replacing(path) as temporary:
        try:
            save_file(_unshare(tensors), temporary, metadata={**metadata, "format": "pt"})
        except SafetensorError as error:  # a disk error, as the tensors are valid
            raise OSError(str(error)) from error
    return path


def _unshare(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors that share memory, as sources of a pack may: safetensors refuses to write them."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.contiguous()
        place = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if place in seen else plain
        seen.add(place)
    return separate


def _scalar(alpha: float) -> torch.Tensor:
    """An alpha as a scalar tensor: float32 as in kohya's files, or float64 if float32 would round it."""
    exact = torch.tensor(alpha, dtype=torch.float64)
    return exact.float() if float(exact.float()) == alpha else exact
