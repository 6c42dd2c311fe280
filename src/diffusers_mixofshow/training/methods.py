"""What each method learns: ED-LoRA, parts of it, and the methods it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


Adapts = Literal["attention", "text keys and values", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method learns.

    Args:
        tokens: Number of learnable tokens that stand for the concept: V_rand and V_class, or one.
        starts_at_class: Whether the last token starts at the class word's embedding; the others start from noise.
        trains_class: Whether the last token is trained.
        layerwise: Whether every cross-attention layer has embeddings of its own.
        adapts: ``attention`` trains a LoRA on all attention layers, ``text keys and values`` those of cross-attention
            as full matrices.
    """

    tokens: int
    starts_at_class: bool = True
    trains_class: bool = True
    layerwise: bool
    adapts: Adapts


METHODS: dict[str, Method] = {
    "ed-lora": Method(tokens=2, layerwise=True, adapts="attention"),
    "ed-lora-shared-layers": Method(tokens=2, layerwise=False, adapts="attention"),
    "ed-lora-without-class": Method(tokens=1, starts_at_class=False, layerwise=True, adapts="attention"),
    "lora": Method(tokens=1, layerwise=False, adapts="attention"),
    "textual-inversion": Method(tokens=1, layerwise=False, adapts="nothing"),
    "p-plus": Method(tokens=1, layerwise=True, adapts="nothing"),
    "custom-diffusion": Method(tokens=2, trains_class=False, layerwise=False, adapts="text keys and values"),
}
"""By name: ED-LoRA (arXiv:2305.18292), the same without layer-wise embeddings and without V_class, a plain LoRA whose
one token starts at the class word, textual inversion (arXiv:2208.01618), P+ (arXiv:2303.09522), and Custom Diffusion
(arXiv:2212.04488): one new token before the class word, which stays, and the keys and values of cross-attention.
"""
