"""Plain LoRA files of other programs: diffusers (old and new names), PEFT, and kohya / A1111, as safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from diffusers_mixofshow.atomic import write_whole
from diffusers_mixofshow.edlora import stock
from diffusers_mixofshow.edlora.defects import listed, raise_if_any
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError
from diffusers_mixofshow.sites import canonical_name, is_linear_site


PLAIN_NAME = "pytorch_lora_weights.safetensors"
"""What `load_lora_weights` of diffusers looks for in a folder."""

_HALF = re.compile(
    r"(?P<layer>.+?)[._](?P<half>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|lora_linear_layer\.down|"
    r"lora_linear_layer\.up)(\.default)?\.weight"
)
_FLAT = re.compile(r"lora_(?P<component>unet|te|te1|te2)_(?P<path>.+)")
_FLAT_COMPONENTS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
_COMPONENT = re.compile(r"(unet|text_encoder_2|text_encoder)\.")
# Names with an underscore of their own, which kohya's files do not tell from the dots between names.
_WORDS = re.compile(
    r"down_blocks|mid_block|up_blocks|transformer_blocks|to_q|to_k|to_v|to_out|proj_in|proj_out|text_model|self_attn|"
    r"q_proj|k_proj|v_proj|out_proj|time_emb_proj|conv_shortcut|[^_]+"
)
_REFUSED = {
    r"dora_scale|lora_magnitude_vector": "DoRA, whose effect is no low-rank update",
    r"hada_|lokr_|lora_mid|oft_|\.on_input": "LyCORIS layers other than LoRA (LoHa, LoKr, Tucker, OFT)",
    r"\.diff(_b)?$|lora_B\.bias|\.bias$": "biases or full differences, which are no low-rank update",
}


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
    metadata, tensors = _load(path)
    layers, defects = _sorted(tensors)
    configs = _configs(metadata)
    lora, misshapen = {}, []
    for site, layer in layers.items():
        if len(layer.halves) < 2 or not is_linear_site(site):
            misshapen.append(site)
            continue
        down, up = layer.halves["down"].float(), layer.halves["up"].float()
        update = LowRank.from_file(down, up, _alpha(site, layer.alpha, len(down), configs))
        if update.down.dim() == update.up.dim() == 2 and update.down.shape[0] == update.up.shape[1]:
            lora[site] = update
        else:
            misshapen.append(site)
    if misshapen:
        defects.append(f"not a pair of matrices of a linear layer or 1 x 1 convolution: {listed(misshapen)}")
    if not lora and not defects:
        defects.append("no tensor of it belongs to a layer of a text encoder or U-Net")
    raise_if_any(
        defects,
        subject=str(path),
        remedy="Expected a LoRA of Stable Diffusion in the names of diffusers, PEFT or kohya.",
    )
    return lora


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata in the header of a safetensors file; empty of any other file."""
    try:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return {}


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
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {**(metadata or {}), "format": "pt", **stock.adapter_metadata(lora)}
    write_whole(path, serialize(tensors, metadata=header))
    return path


def _load(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as opened:
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}
    except FileNotFoundError as error:
        raise EDLoRANotFoundError(f"{path} does not exist. Give a LoRA as a safetensors file.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise EDLoRAFormatError(
            f"{path} cannot be read as safetensors: {error}. Convert .pt and .ckpt files first; pickles are not read."
        ) from error


def _sorted(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, _Layer], list[str]]:
    """Sort tensors into layers by site; list what cannot be said as a LoRA."""
    layers: dict[str, _Layer] = {}
    refused: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        reason = next((why for pattern, why in _REFUSED.items() if re.search(pattern, name)), None)
        match = _HALF.fullmatch(name)
        if reason is not None:
            refused.setdefault(reason, []).append(name)
        elif match is not None:
            half = "down" if match["half"].endswith(("_A", "down")) else "up"
            layers.setdefault(_site(match["layer"]), _Layer()).halves[half] = tensor
        elif name.endswith(".alpha"):
            layers.setdefault(_site(name.removesuffix(".alpha")), _Layer()).alpha = float(tensor)
        else:
            refused.setdefault("tensors of no known meaning", []).append(name)
    return layers, [f"{reason}: {listed(names)}" for reason, names in refused.items()]


def _site(layer: str) -> str:
    """Site name of a layer as any of the programs spells it."""
    if flat := _FLAT.fullmatch(layer):
        return canonical_name(_FLAT_COMPONENTS[flat["component"]], ".".join(_WORDS.findall(flat["path"])))
    layer = layer.removeprefix("base_model.model.")
    layer = layer.replace(".processor.", ".")
    if layer.endswith(".to_out"):
        layer += ".0"
    named = _COMPONENT.match(layer)
    component = named[1] if named else ("text_encoder" if "encoder.layers" in layer else "unet")
    return canonical_name(component, layer.removeprefix(f"{component}."))


def _configs(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings as diffusers writes them, ``unet.lora_alpha`` and the like; empty if there are none."""
    try:
        values = json.loads(metadata.get(stock.KEY, "{}"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _alpha(site: str, given: float | None, rank: int, configs: Mapping[str, Any]) -> float:
    """The alpha for which alpha / rank is the file's scaling; the rank where nothing is said, as everywhere."""
    component, _, path = site.partition(".")
    alpha = given
    if alpha is None:
        alpha = configs.get(f"{component}.lora_alpha", rank)
        for pattern, value in (configs.get(f"{component}.alpha_pattern") or {}).items():
            name = re.sub(r"^\^|\\", "", pattern)
            if f".{path}".endswith(f".{name}"):
                alpha = value
    if configs.get(f"{component}.use_rslora"):
        return float(alpha) * math.sqrt(rank)  # scaled by alpha / sqrt(rank)
    return float(alpha)
