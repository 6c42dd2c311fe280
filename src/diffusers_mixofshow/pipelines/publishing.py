"""Join everything that is loaded into a pipeline to one pack, for publishing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer

from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.errors import ConceptError
from diffusers_mixofshow.families.layers import linear_layers


def join_packs(components: Mapping[str, object], edloras: Mapping[str, EDLoRA]) -> EDLoRA:
    """Make one pack that acts as all loaded ones do together, with their current scales, without inactive ones.

    Updates of one layer are stacked, which is exact: sum_i s_i B_i A_i = [s_1 B_1, s_2 B_2, ...] [A_1; A_2; ...].

    Args:
        components: ``pipeline.components``, with the adapters loaded.
        edloras: Adapter name to pack.

    Raises:
        ConceptError: If no concept is loaded.
    """
    if not any(edlora.concepts for edlora in edloras.values()):
        what = "Only LoRAs without a concept are" if edloras else "Nothing is"
        raise ConceptError(f"{what} loaded. Load a concept with load_edlora() first.")
    layers = linear_layers(components)
    parts: dict[str, list[tuple[LowRank, float]]] = {}
    for name, edlora in edloras.items():
        for site, update in edlora.lora.items():
            if strength := _read_strength(layers.get(site), name):
                parts.setdefault(site, []).append((update, strength))
    packs = list(edloras.values())
    return EDLoRA(
        concepts=tuple(concept for pack in packs for concept in pack.concepts),
        embeddings={token: rows for pack in packs for token, rows in pack.embeddings.items()},
        lora={site: _stack(updates) for site, updates in parts.items()},
        base_model=next((pack.base_model for pack in packs if pack.base_model), ""),
        layers=next((pack.layers for pack in packs if pack.layers), ()),
        training=packs[0].training if len(packs) == 1 else {},
    )


def _read_strength(layer: object, adapter: str) -> float:
    """The factor that a layer puts on an adapter's ``up @ down``; 0 where the adapter is inactive or removed."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or adapter not in layer.active_adapters:
        return 0.0
    return float(layer.scaling.get(adapter, 0.0))


def _stack(updates: list[tuple[LowRank, float]]) -> LowRank:
    """Stack several updates of a layer, each with its factor; alpha is the rank, so that the scale is 1."""
    down = torch.cat([update.down.float() for update, _ in updates])
    up = torch.cat([strength * update.up.float() for update, strength in updates], dim=1)
    return LowRank(down=down, up=up, alpha=float(len(down)), convolution=updates[0][0].convolution)
