"""What fusion has to know about a concept: the Gram matrix of every layer's inputs, gathered as a stream."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch


_SHARED = re.compile(r"(?P<attention>.*)\.(?P<projection>to_q|to_k|to_v|q_proj|k_proj|v_proj)")


def input_name(site: str) -> str:
    """Name the input that a layer reads, the same for all layers that read the same tensor.

    The q, k and v of a self-attention read one input, and so do the k and v of a cross-attention.

    Args:
        site: A layer's name, see `sites`.

    Returns:
        E.g. ``....attn1.to_q+to_k+to_v``, ``....attn2.to_k+to_v``, ``....self_attn.q_proj+k_proj+v_proj``, or the
        site's own name.
    """
    match = _SHARED.fullmatch(site)
    if match is None:
        return site
    attention, projection = match["attention"], match["projection"]
    if attention.endswith(".attn2"):
        return site if projection == "to_q" else f"{attention}.to_k+to_v"
    if projection.startswith("to_"):
        return f"{attention}.to_q+to_k+to_v"
    return f"{attention}.q_proj+k_proj+v_proj"


class ConceptStatistics:
    """Streaming Gram matrices X X^T of one concept's layer inputs; no feature is kept.

    Products are taken in float64 on a CPU and in float32 elsewhere, and summed in float64 where the device has it.
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}

    def add(self, name: str, features: torch.Tensor) -> None:
        """Add the features that went into a layer.

        Args:
            name: The input's name, see `input_name`.
            features: Any number of tokens, shape (..., in_features).
        """
        rows = features.detach().flatten(end_dim=-2)  # (tokens, in_features)
        rows = rows.to(torch.float64 if rows.device.type == "cpu" else torch.float32)
        product = rows.T @ rows  # (in_features, in_features)
        if name not in self._sums:
            dtype = torch.float32 if rows.device.type == "mps" else torch.float64
            self._sums[name] = torch.zeros(product.shape, dtype=dtype, device=product.device)
            self._tokens[name] = 0
        self._sums[name] += product
        self._tokens[name] += len(rows)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs seen so far."""
        return tuple(self._sums)

    def tokens(self, name: str) -> int:
        """Number of tokens seen at an input; 0 if it was never met."""
        return self._tokens.get(name, 0)

    def gram(self, name: str) -> torch.Tensor:
        """Gram matrix per token, X X^T / tokens, so that concepts weigh the same however long they were recorded.

        Args:
            name: The input's name, see `input_name`.

        Returns:
            Shape (in_features, in_features), float64, on the CPU.
        """
        return self._sums[name].cpu().double() / self._tokens[name]


def summed_gram(statistics: Iterable[ConceptStatistics], name: str) -> torch.Tensor:
    """Gram matrix of several concepts that share one update, every concept weighing the same.

    Args:
        statistics: One per concept.
        name: The input's name, see `input_name`.

    Returns:
        Shape (in_features, in_features), float64, on the CPU.
    """
    return torch.stack([one.gram(name) for one in statistics]).sum(dim=0)
