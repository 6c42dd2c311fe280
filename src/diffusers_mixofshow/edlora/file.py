"""Read and write ``edlora.safetensors``.

Tensors: ``unet.<path>.lora_A.weight`` and ``.lora_B.weight``, ``text_encoder.text_model.<path>...`` (PEFT's names,
which stock diffusers loads), and ``edlora.embeddings.<token>``, shape (layers, dim); for a second text encoder also
``edlora.embeddings.text_encoder_2.<token>``, and for its pooled vector ``edlora.embeddings.pooled.<token>``, shape
(1, dim) (see `embeddings`). Header metadata: one JSON string under
``edlora`` (see `header`).

If an alpha differs from its rank, the header also has metadata for diffusers (see `stock`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import torch
from safetensors.torch import save as serialize

from diffusers_mixofshow.atomic import write_whole
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import defects, header, reading, stock
from diffusers_mixofshow.edlora.embeddings import split_name
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.edlora.reading import PREFIX
from diffusers_mixofshow.families.layers import canonical_name


FILE_NAME = "edlora.safetensors"

PLAIN_NAME = "pytorch_lora_weights.safetensors"
"""File name that diffusers' `load_lora_weights` looks for in a folder, and that of a pack of plain LoRAs alone."""

STATISTICS_KEY = "edlora_statistics"
"""Header key of a file of fusion statistics, which lies beside its ED-LoRA."""

_HEADER_KEY = "edlora"
_EMBEDDINGS = "edlora.embeddings."
_DOWN = ".lora_A.weight"
_UP = ".lora_B.weight"

_NOT_OF_FORMAT_1 = "embeddings for several text encoders, which format 1 does not have"

_Pairs = dict[str, dict[str, torch.Tensor]]


class Contents(TypedDict):
    """The fields of an `EDLoRA`, as stored in a file."""

    concepts: tuple[Concept, ...]
    embeddings: Mapping[str, torch.Tensor]
    lora: Mapping[str, LowRank]
    base_model: str
    layers: tuple[str, ...]
    training: Mapping[str, object]


def check(contents: Contents) -> None:
    """Raise an `EDLoRAFormatError` that lists why a pack cannot be written, if there is any reason."""
    found = defects.content_defects(contents["concepts"], contents["embeddings"], contents["lora"], contents["layers"])
    found += [] if contents["concepts"] else ["it holds no concept"]
    found += [] if header.is_text(contents["base_model"]) else ["its base model's id is too long or not printable"]
    defects.raise_if_any(found, subject="This ED-LoRA cannot be saved", remedy="Nothing was written.")


def write(path: Path, contents: Contents) -> None:
    """Write a pack; the file appears whole or not at all.

    Raises:
        EDLoRAFormatError: If the pack is inconsistent.
    """
    check(contents)
    lora = contents["lora"]
    text = header.Header(
        concepts=contents["concepts"],
        base_model=contents["base_model"],
        layers=contents["layers"],
        lora={site: (update.rank, float(update.alpha)) for site, update in lora.items()},
        training=contents["training"],
        version=_version_of(contents["embeddings"]),
    ).to_json()
    tensors = {_EMBEDDINGS + token: rows for token, rows in contents["embeddings"].items()}
    for site, update in lora.items():
        tensors |= dict(zip((site + _DOWN, site + _UP), update.in_file, strict=True))
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": "pt", _HEADER_KEY: text, **stock.adapter_metadata(lora)}
    write_whole(path, _sort_header(serialize(tensors, metadata=metadata)))


def read(path: Path) -> Contents:
    """Read a pack and check it.

    Raises:
        EDLoRANotFoundError: If there is no file.
        EDLoRAFormatError: If the file is defective; lists every defect.
    """
    metadata, tensors = reading.read_tensors(path)
    if _HEADER_KEY in metadata:
        head, found = header.parse(metadata[_HEADER_KEY])
    else:
        head, found = header.EMPTY, [f"it has no {_HEADER_KEY!r} header, so it is not an ED-LoRA"]
    embeddings, pairs, surprising = _sort(tensors)
    announced = {_canonical(site): numbers for site, numbers in head.lora.items()}
    lora = _join_pairs(pairs, announced)
    if not found:
        found += _differences(pairs, announced)
        found += defects.content_defects(head.concepts, embeddings, lora, head.layers)
        found += [] if head.version >= _version_of(embeddings) else [_NOT_OF_FORMAT_1]
        found += [] if head.concepts or head.layers or embeddings else ["it holds no concept"]
    defects.raise_if_any(
        [*found, *surprising],
        subject=str(path),
        remedy=f"Expected an ED-LoRA of format {header.FORMAT_VERSION}, as written by EDLoRA.save_pretrained().",
    )
    return Contents(
        concepts=head.concepts,
        embeddings=embeddings,
        lora=lora,
        base_model=head.base_model,
        layers=head.layers,
        training=head.training,
    )


def _version_of(embeddings: Mapping[str, torch.Tensor]) -> int:
    """The oldest format version that can hold these embeddings."""
    several = any(split_name(name)[0] for name in embeddings)
    return header.FORMAT_VERSION if several else header.ONE_ENCODER


def _sort_header(content: bytes) -> bytes:
    """Sort the header of a safetensors file: equal packs become equal files, which the Hub stores once."""
    length = int.from_bytes(content[:PREFIX], "little")
    header = json.dumps(json.loads(content[PREFIX : PREFIX + length]), sort_keys=True, separators=(",", ":"))
    text = header.encode()
    text += b" " * (-len(text) % PREFIX)  # the data stays aligned
    return b"".join((len(text).to_bytes(PREFIX, "little"), text, memoryview(content)[PREFIX + length :]))


def _sort(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], _Pairs, list[str]]:
    """Sort tensors by name into embeddings and halves of LoRA pairs; list the names that are neither."""
    embeddings: dict[str, torch.Tensor] = {}
    pairs: _Pairs = {}
    unexpected, twice = [], []
    for name, tensor in tensors.items():
        ending = next((ending for ending in (_DOWN, _UP) if name.endswith(ending)), None)
        if name.startswith(_EMBEDDINGS):
            embeddings[name.removeprefix(_EMBEDDINGS)] = tensor
        elif ending is None:
            unexpected.append(name)
        elif ending in pairs.setdefault(site := _canonical(name.removesuffix(ending)), {}):
            twice.append(site + ending)
        else:
            pairs[site][ending] = tensor
    found = [f"unexpected tensors: {defects.list_names(unexpected)}"] if unexpected else []
    if twice:
        found.append(f"tensors given under both spellings of the text encoder: {defects.list_names(twice)}")
    return embeddings, pairs, found


def _canonical(site: str) -> str:
    component, _, path = site.partition(".")
    return canonical_name(component, path)


def _differences(pairs: _Pairs, lora: Mapping[str, tuple[int, float]]) -> list[str]:
    """List differences between the header's list of layers and the tensors of the file."""
    found = []
    announced = [(site, ending) for site in lora for ending in (_DOWN, _UP)]
    if missing := [site + ending for site, ending in announced if ending not in pairs.get(site, {})]:
        found.append(f"missing tensors: {defects.list_names(missing)}")
    if unannounced := [site for site in pairs if site not in lora]:
        found.append(f"layers that its header does not name: {defects.list_names(unannounced)}")
    downs = {site: halves[_DOWN].shape for site, halves in pairs.items() if _DOWN in halves and site in lora}
    if wrong := [site for site, shape in downs.items() if shape[:1] != (lora[site][0],)]:
        found.append(f"ranks differ from the header's: {defects.list_names(wrong)}")
    return found


def _join_pairs(pairs: _Pairs, lora: Mapping[str, tuple[int, float]]) -> dict[str, LowRank]:
    return {
        site: LowRank.from_file(halves[_DOWN], halves[_UP], lora[site][1])
        for site, halves in pairs.items()
        if site in lora and len(halves) == 2
    }
