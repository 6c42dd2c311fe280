"""Plain LoRA files of other programs: diffusers (old and new names), PEFT, ComfyUI, and kohya / A1111."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize

from diffusers_mixofshow.atomic import write_whole
from diffusers_mixofshow.edlora import stock
from diffusers_mixofshow.edlora.defects import content_defects, listed, raise_if_any
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import EDLoRAFormatError
from diffusers_mixofshow.interop.architectures import recognised
from diffusers_mixofshow.interop.names import Spelling, half_of, kohya_name, site_of, spelling_of
from diffusers_mixofshow.interop.tensors import PICKLES, in_working_dtype, load_safetensors
from diffusers_mixofshow.sites import is_linear_site


PLAIN_NAME = "pytorch_lora_weights.safetensors"
"""What `load_lora_weights` of diffusers looks for in a folder."""
PEFT_NAME = "adapter_model.safetensors"
"""What PEFT writes, with its settings in `PEFT_CONFIG` beside it."""
PEFT_CONFIG = "adapter_config.json"

EMBEDDINGS = "embeddings"
"""Folder of textual-inversion files beside a LoRA file, named as A1111 and ComfyUI name theirs."""

_COMPANIONS = "mixofshow_embeddings"
"""In a LoRA file's metadata: the words whose embeddings were written beside it."""
_MOST_COMPANIONS = 1000
_BUNDLED = re.compile(r"bundle_emb\.(?P<name>.+?)\.(?P<vectors>string_to_param\.\*|emb_params|clip_l|clip_g)")
_REFUSED = {
    r"dora_scale|lora_magnitude_vector": "DoRA, whose effect is no low-rank update",
    r"hada_|lokr_|lora_mid|oft_|\.on_input": "LyCORIS layers other than LoRA (LoHa, LoKr, Tucker, OFT)",
    r"\.diff(_b)?$|lora_B\.bias|\.bias$": "biases or full differences, which are no low-rank update",
}


@dataclass(frozen=True, kw_only=True)
class LoRAContent:
    """What a LoRA file holds, sound or not.

    Args:
        lora: Site name to update, of all layers that are sound.
        spelling: Whose names it has.
        bundled: Name of an embedding that is packed into the file to text encoder (``clip_l``, ``clip_g``) to
            its vectors, shape (vectors, dim).
        metadata: The file's own.
        defects: What of it cannot be used.
    """

    lora: Mapping[str, LowRank]
    spelling: Spelling
    bundled: Mapping[str, Mapping[str, torch.Tensor]]
    metadata: Mapping[str, str]
    defects: tuple[str, ...]


@dataclass
class _Layer:
    """What a file says of one layer."""

    halves: dict[str, torch.Tensor] = field(default_factory=dict)
    alpha: float | None = None


def read_lora(path: Path) -> dict[str, LowRank]:
    """Read a plain LoRA file.

    Args:
        path: A safetensors file; pickles are not read.

    Returns:
        Site name (see `sites`) to its update; 1 x 1 convolutions as matrices.

    Raises:
        EDLoRANotFoundError: If there is no such file.
        EDLoRAFormatError: If it is no LoRA, or holds what no low-rank update of a linear layer can say; names all.
    """
    content = lora_content(path)
    bundled = f"it bundles embeddings, which are no part of a plain LoRA: {listed(content.bundled)}"
    raise_if_any(
        [*content.defects, *([bundled] if content.bundled else [])],
        subject=str(path),
        remedy="Expected a LoRA of Stable Diffusion in the names of diffusers, PEFT or kohya.",
    )
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
    return content_of(tensors, metadata, _configs(path, metadata))


def content_of(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], configs: Mapping[str, Any]
) -> LoRAContent:
    """Sort the tensors of a LoRA file.

    Args:
        tensors: Name to tensor, as in the file.
        metadata: The file's own.
        configs: PEFT's settings, each with its component in front: ``unet.lora_alpha``.
    """
    layers, bundled, defects = _sorted(tensors)
    lora, misshapen = {}, []
    for site, layer in layers.items():
        if len(layer.halves) < 2 or not is_linear_site(site):
            misshapen.append(site)
            continue
        down, up = (in_working_dtype(layer.halves[half]) for half in ("down", "up"))
        update = LowRank.from_file(down, up, _alpha(site, layer.alpha, max([1, *down.shape[:1]]), configs))
        if update.down.dim() == update.up.dim() == 2 and update.down.shape[0] == update.up.shape[1] >= 1:
            lora[site] = update
        else:
            misshapen.append(site)
    if misshapen:
        defects.append(f"not a pair of matrices of a linear layer or 1 x 1 convolution: {listed(misshapen)}")
    defects += content_defects((), {}, lora, ()) if lora else []
    if not lora and not defects:
        defects.append("no tensor of it belongs to a layer of a text encoder or U-Net")
    spellings = Counter(spelling_of(name) for name in tensors if half_of(name))
    spelling = spellings.most_common(1)[0][0] if spellings else Spelling.DIFFUSERS
    return LoRAContent(lora=lora, spelling=spelling, bundled=bundled, metadata=metadata, defects=tuple(defects))


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


def write_kohya(path: Path, lora: Mapping[str, LowRank], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a LoRA file in kohya's names, which A1111 and ComfyUI load; it appears whole or not at all.

    Every layer's alpha is in the file, so that layers may differ in it. The text encoder's layers keep
    ``text_model`` in their names, and those of SDXL's two are numbered, whatever transformers calls them.

    Args:
        path: The file; its folder is created where it is missing.
        lora: Site name to update.
        metadata: Further entries of the file's header.
    """
    family = recognised(lora)
    xl = family is not None and family.is_xl
    tensors: dict[str, torch.Tensor] = {}
    for site, update in lora.items():
        name = kohya_name(site, several_text_encoders=xl, ldm=xl)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = update.in_file
        tensors[f"{name}.alpha"] = _scalar(update.alpha)
    ranks, alphas = {update.rank for update in lora.values()}, {update.alpha for update in lora.values()}
    told = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    if family is not None:
        told["ss_base_model_version"] = family.kohya
    return _write(path, tensors, {**(metadata or {}), **told})


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    # Sources of a fused pack share factors, which safetensors would refuse to write twice.
    separate = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    write_whole(path, serialize(separate, metadata={**metadata, "format": "pt"}))
    return path


def _scalar(alpha: float) -> torch.Tensor:
    """An alpha as kohya's files hold it; in double precision where single would change it."""
    exact = torch.tensor(alpha, dtype=torch.float64)
    return exact.float() if float(exact.float()) == alpha else exact


def _sorted(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, _Layer], dict[str, dict[str, torch.Tensor]], list[str]]:
    """Sort tensors into layers by site and bundled embeddings; list what cannot be said as a LoRA."""
    layers: dict[str, _Layer] = {}
    bundled: dict[str, dict[str, torch.Tensor]] = {}
    refused: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        reason = next((why for pattern, why in _REFUSED.items() if re.search(pattern, name)), None)
        half, embedding = half_of(name), _BUNDLED.fullmatch(name)
        if reason is not None:
            refused.setdefault(reason, []).append(name)
        elif half is not None:
            layer = layers.setdefault(site_of(half[0]), _Layer())
            if half[1] in layer.halves:
                refused.setdefault("layers given twice, in two spellings", []).append(name)
            layer.halves[half[1]] = tensor
        elif name.endswith(".alpha") and tensor.numel() == 1:
            layers.setdefault(site_of(name.removesuffix(".alpha")), _Layer()).alpha = float(tensor)
        elif embedding is not None and tensor.dim() in (1, 2) and tensor.numel() and tensor.is_floating_point():
            encoder = "clip_g" if embedding["vectors"] == "clip_g" else "clip_l"
            bundled.setdefault(embedding["name"], {})[encoder] = in_working_dtype(tensor).reshape(-1, tensor.shape[-1])
        else:
            refused.setdefault("tensors of no known meaning", []).append(name)
    return layers, bundled, [f"{reason}: {listed(names)}" for reason, names in refused.items()]


def _configs(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings, ``unet.lora_alpha`` and the like: as diffusers writes them, or from PEFT's own file."""
    beside = path.with_name(PEFT_CONFIG)
    if path.name == PEFT_NAME and beside.is_file():
        values = _json_object(beside.read_text(encoding="utf-8", errors="replace"))
        return {f"{component}.{key}": value for key, value in values.items() for component in ("unet", "text_encoder")}
    return _json_object(metadata.get(stock.KEY, "{}"))


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _alpha(site: str, given: float | None, rank: int, configs: Mapping[str, Any]) -> float:
    """The alpha for which alpha / rank is the file's scaling; the rank where nothing is said, as everywhere."""
    component, _, path = site.partition(".")
    alpha = given
    if alpha is None:
        alpha = _number(configs.get(f"{component}.lora_alpha"), float(rank))
        patterns = configs.get(f"{component}.alpha_pattern")
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            name = re.sub(r"^\^|\\", "", pattern)
            if f".{path}".endswith(f".{name}"):
                alpha = _number(value, alpha)
    if configs.get(f"{component}.use_rslora"):
        return alpha * math.sqrt(rank)  # scaled by alpha / sqrt(rank)
    return alpha


def _number(value: object, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise
