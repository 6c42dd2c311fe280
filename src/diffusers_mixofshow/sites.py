"""The only owner of which layers are adapted, how they are named, and in which order they stand.

A *site* is a linear layer that a LoRA may adapt. Its name is the component's name in the pipeline, a dot, and
the module's path, e.g. ``unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k`` or
``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``. Text-encoder names always carry ``text_model.``,
whether or not the installed transformers has a module of that name (it is gone since 5.6).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn


_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_TEXT_SITE = re.compile(r"encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)")
_UNET_SITE = re.compile(r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)")
_TEXT_READER = re.compile(r"unet\..*\.attn2\.(to_k|to_v)")
_ANY_TEXT_SITE = re.compile(_TEXT_SITE.pattern + r"|encoder\.layers\.\d+\.mlp\.fc[12]")
_ANY_UNET_SITE = re.compile(
    _UNET_SITE.pattern + r"|.*\.(ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|time_emb_proj|conv_shortcut)"
)
_STAGES = ("down_blocks", "mid_block", "up_blocks")


def components_with_sites(components: Mapping[str, object]) -> dict[str, nn.Module]:
    """Pick the pipeline components whose attention layers a concept adapts: text encoders, then the U-Net.

    Of a component that `torch.compile` has wrapped it is the model inside.
    """
    found = {name: components.get(name) for name in (*_TEXT_ENCODERS, "unet")}
    return {name: uncompiled(module) for name, module in found.items() if isinstance(module, nn.Module)}


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, where `torch.compile` has wrapped it."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def canonical_name(component: str, path: str) -> str:
    """Site name of a module path inside a component, the same under every transformers version."""
    if component in _TEXT_ENCODERS:
        path = "text_model." + path.removeprefix("text_model.")
    return f"{component}.{path}"


def adapted_layers(components: Mapping[str, object]) -> dict[str, nn.Module]:
    """Find every linear layer that an ED-LoRA adapts: q, k, v and out of all attention modules.

    Args:
        components: ``pipeline.components`` or any mapping with ``unet`` and ``text_encoder``; absent ones are
            left out. A layer already wrapped by PEFT counts under its own name.

    Returns:
        Site name to module, text encoders first, then the U-Net in the order down, mid, up.
    """
    return _matching(components, _TEXT_SITE, _UNET_SITE)


def reads_text(site: str) -> bool:
    """Whether a site of the U-Net reads the text: the keys and values of cross-attention."""
    return _TEXT_READER.fullmatch(site) is not None


def linear_layers(components: Mapping[str, object]) -> dict[str, nn.Module]:
    """Find every layer that any LoRA may adapt: those of ED-LoRAs, feed-forward layers and projections.

    Args:
        components: As in `adapted_layers`.

    Returns:
        Site name to module, which is linear or a 1 x 1 convolution, in the order of `adapted_layers`.
    """
    return _matching(components, _ANY_TEXT_SITE, _ANY_UNET_SITE)


def is_linear_site(site: str) -> bool:
    """Whether a site has the name of a layer that `linear_layers` may find."""
    component, _, path = site.partition(".")
    if component == "unet":
        return path.partition(".")[0] in _STAGES and _ANY_UNET_SITE.fullmatch(path) is not None
    return component in _TEXT_ENCODERS and _ANY_TEXT_SITE.fullmatch(path.removeprefix("text_model.")) is not None


def cross_attention_layers(unet: nn.Module) -> tuple[str, ...]:
    """Name the U-Net's cross-attention modules in the paper's order: down, mid, up (section 3.3.1, from P+).

    Works for any denoiser with the same blocks; a ControlNet's layers are the first ones of its U-Net.

    Returns:
        Module paths such as ``down_blocks.0.attentions.0.transformer_blocks.0.attn2``; layer k of a layer-wise
        embedding belongs to the k-th of them.
    """
    return _attention_layers(unet, "attn2")


def self_attention_layers(unet: nn.Module) -> tuple[str, ...]:
    """Name the denoiser's self-attention modules, in the same order as `cross_attention_layers`."""
    return _attention_layers(unet, "attn1")


def _attention_layers(unet: nn.Module, name: str) -> tuple[str, ...]:
    paths = [path for path, _ in uncompiled(unet).named_modules() if path.endswith(f".{name}")]
    return tuple(sorted(paths, key=_stage_of))


def _matching(components: Mapping[str, object], text: re.Pattern[str], unet: re.Pattern[str]) -> dict[str, nn.Module]:
    sites: dict[str, nn.Module] = {}
    for component, model in components_with_sites(components).items():
        pattern = unet if component == "unet" else text
        paths = {path.removeprefix("text_model."): (path, module) for path, module in model.named_modules()}
        names = [short for short in paths if pattern.fullmatch(short)]
        if component == "unet":
            names.sort(key=_stage_of)
        for short in names:
            path, module = paths[short]
            sites[canonical_name(component, path)] = module
    return sites


def _stage_of(path: str) -> int:
    return _STAGES.index(path.partition(".")[0])
