"""Cross-attention maps: where in the picture each token of the text is attended to, recorded under any processors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from diffusers_mixofshow.conditioning.attention import SharedTexts
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.training.losses import token_attention


class AttentionRecord:
    """Queries and keys of every cross-attention layer in the last forward pass.

    Args:
        layers: Path to attention module, in the order down, mid, up.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self.layers = layers
        self.queries: dict[str, torch.Tensor] = {}
        self.keys: dict[str, torch.Tensor] = {}

    def maps(
        self, positions: Sequence[int], height: int, width: int, text_of: torch.Tensor | None = None
    ) -> dict[tuple[int, int], torch.Tensor]:
        """Attention to one token of each picture's text, averaged over heads and over layers of equal map size.

        Args:
            positions: For each picture, the token's position in its text.
            height: Of the latents.
            width: Of the latents.
            text_of: For each picture, the row of the conditioning that it reads; None: the row of its own number.

        Returns:
            Size of the maps to a tensor of shape (batch, map height, map width).
        """
        texts = SharedTexts(text_of)  # keys have a row per text, or already one per picture, by the processor
        by_size: dict[tuple[int, int], list[torch.Tensor]] = {}
        for path, queries in self.queries.items():
            size = _map_size(queries.shape[1], height, width)
            keys = texts.spread(self.keys[path], len(queries))
            attention = token_attention(queries, keys, self.layers[path].heads, positions)
            by_size.setdefault(size, []).append(attention.unflatten(1, size))
        return {size: torch.stack(maps).mean(dim=0) for size, maps in by_size.items()}


@contextmanager
def record_attention(unet: nn.Module) -> Iterator[AttentionRecord]:
    """Record queries and keys of every cross-attention layer inside the block, by hooks that are removed afterwards.

    Gradients flow through the recorded tensors. Works under any processor that projects queries and keys with the
    layer's own ``to_q`` and ``to_k``, as all of diffusers' do.
    """
    layers: dict[str, Any] = {path: unet.get_submodule(path) for path in cross_attention_layers(unet)}
    record = AttentionRecord(layers)
    with ExitStack() as hooks:
        for path, layer in layers.items():
            for projection, noted in ((layer.to_q, record.queries), (layer.to_k, record.keys)):
                hooks.callback(projection.register_forward_hook(_make_hook(noted, path)).remove)
        yield record


def _make_hook(noted: dict[str, torch.Tensor], path: str) -> Callable[..., None]:
    def note(_module: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        noted[path] = output

    return note


def _map_size(positions: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a feature map with this many positions: the U-Net halves both at once, rounded up."""
    while height * width > positions:
        height, width = -(-height // 2), -(-width // 2)
    return height, width
