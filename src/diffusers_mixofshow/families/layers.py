"""Find the adapted layers of a loaded model, with their site names and order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families.recognition import family_of, family_of_denoiser, unwrap_compiled


_NUMBER = re.compile(r"\.layers\.(\d+)\.")
_CLIP_PATH = re.compile(r"(text_model\.)?(encoder|encoder\..+|embeddings|embeddings\..+|final_layer_norm)")


def canonical_name(component: str, path: str) -> str:
    """Site name of a module path inside a component, independent of the transformers version."""
    if component.startswith("text_encoder") and _CLIP_PATH.fullmatch(path):
        path = "text_model." + path.removeprefix("text_model.")
    return f"{component}.{path}"


def components_with_sites(components: Mapping[str, object]) -> dict[str, nn.Module]:
    """Pick the pipeline components whose layers are adapted: text encoders, then the denoiser.

    A component wrapped by `torch.compile` is unwrapped.
    """
    found = {name: components.get(name) for name in family_of(components).components}
    return {name: unwrap_compiled(module) for name, module in found.items() if isinstance(module, nn.Module)}


def adapted_layers(components: Mapping[str, object]) -> dict[str, nn.Module]:
    """Find every linear layer that an ED-LoRA adapts: q, k, v and out of all attention modules.

    Args:
        components: ``pipeline.components`` or any mapping with some of them; absent ones are skipped. A layer
            wrapped by PEFT is found under its own name.

    Returns:
        Site name to module, text encoders first, then the denoiser in the order of its blocks.
    """
    return _find_layers(components, any_lora=False)


def unread_layers(components: Mapping[str, object]) -> frozenset[str]:
    """Sites of `adapted_layers` without effect: last layers of a text encoder whose states nothing reads."""
    family, found = family_of(components), set()
    for name, encoder in family.text_encoders.items():
        model: Any = components.get(name)
        if model is not None and encoder.skipped and not encoder.pooled:
            read = model.config.num_hidden_layers - encoder.skipped
            sites = [site for site in adapted_layers(components) if site.startswith(f"{name}.")]
            found |= {site for site in sites if (match := _NUMBER.search(site)) and int(match[1]) >= read}
    return frozenset(found)


def linear_layers(components: Mapping[str, object]) -> dict[str, nn.Module]:
    """Find every layer that any LoRA may adapt: attention, feed-forward layers and projections.

    Args:
        components: As in `adapted_layers`.

    Returns:
        Site name to module, a linear layer or 1 x 1 convolution, in the order of `adapted_layers`.
    """
    return _find_layers(components, any_lora=True)


def cross_attention_layers(denoiser: nn.Module) -> tuple[str, ...]:
    """Names of a denoiser's cross-attention modules, in the order of its blocks; also for a ControlNet.

    Returns:
        Module paths such as ``down_blocks.0.attentions.0.transformer_blocks.0.attn2``.
    """
    return _find_modules(family_of_denoiser(denoiser).cross_attention, denoiser)


def embedding_layers(components: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the cross-attention modules, or groups of them, with one layer-wise embedding each.

    Args:
        components: ``pipeline.components``, or a part of them.

    Returns:
        Names in the order of `cross_attention_layers`; row k of a token's embedding belongs to the k-th. Empty
        without a denoiser.
    """
    family = family_of(components)
    denoiser = components.get(family.denoiser)
    if not isinstance(denoiser, nn.Module):
        return ()
    return tuple(dict.fromkeys(map(family.embedding_layer_of, cross_attention_layers(denoiser))))


def self_attention_layers(denoiser: nn.Module) -> tuple[str, ...]:
    """Names of a denoiser's self-attention modules, in the order of `cross_attention_layers`."""
    return _find_modules(family_of_denoiser(denoiser).self_attention, denoiser)


def default_size(denoiser: nn.Module) -> tuple[int, int]:
    """Default height and width of a denoiser, in cells of the latent.

    Raises:
        ConfigurationError: If its configuration names none.
    """
    size = configured_size(denoiser)
    if size is None:
        raise ConfigurationError("The denoiser's configuration has no sample_size; give height and width.")
    return size


def configured_size(denoiser: nn.Module) -> tuple[int, int] | None:
    """Height and width in the configuration of a denoiser, in cells of the latent; None if it names none."""
    config: Any = unwrap_compiled(denoiser).config
    size = config.get("sample_size")
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _find_modules(name: str, denoiser: nn.Module) -> tuple[str, ...]:
    paths = [path for path, _ in unwrap_compiled(denoiser).named_modules() if name and path.endswith(f".{name}")]
    return tuple(sorted(paths, key=family_of_denoiser(denoiser).block_index))


def _find_layers(components: Mapping[str, object], *, any_lora: bool) -> dict[str, nn.Module]:
    """Site name to module of the layers that an ED-LoRA, or with `any_lora` any LoRA, may adapt."""
    family = family_of(components)
    sites: dict[str, nn.Module] = {}
    for component, model in components_with_sites(components).items():
        part = family.text_encoders.get(component, family)
        pattern = part.linear if any_lora else part.adapted
        found = [(path, module) for path, module in model.named_modules() if pattern.fullmatch(path)]
        if part is family:
            found.sort(key=lambda one: family.block_index(one[0]))
        sites |= {canonical_name(component, path): module for path, module in found}
    return sites
