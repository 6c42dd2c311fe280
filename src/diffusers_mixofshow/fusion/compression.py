"""Gram matrices as low-rank factors, so that a concept's statistics fit beside its LoRA."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch


Key = TypeVar("Key")

_BYTES = 2  # of a float16 value


@dataclass(frozen=True, kw_only=True)
class GramFactor:
    """A Gram matrix per token, approximated as F^T F + tail I.

    Args:
        rows: F, shape (kept, in_features): the leading eigenvectors, times the roots of what their eigenvalues have
            beyond the tail.
        tail: Mean of the eigenvalues that were left out, so that the trace is the original's; the directions left
            out count alike instead of not at all.
        energy: Share of the trace that the rows keep, 0 to 1.
    """

    rows: torch.Tensor
    tail: float
    energy: float

    def gram(self) -> torch.Tensor:
        """The approximation, shape (in_features, in_features), float64."""
        rows = self.rows.double()
        return rows.T @ rows + self.tail * torch.eye(rows.shape[1], dtype=torch.float64)

    @classmethod
    def summed(cls, factors: Sequence[GramFactor], weights: Sequence[float]) -> GramFactor:
        """Factor of a weighted sum of matrices: all rows together.

        Args:
            factors: One for each matrix, of one width.
            weights: Above 0.
        """
        rows = [weight**0.5 * factor.rows.double() for factor, weight in zip(factors, weights, strict=True)]
        tail = sum(weight * factor.tail for factor, weight in zip(factors, weights, strict=True))
        return cls(rows=torch.cat(rows), tail=tail, energy=min(factor.energy for factor in factors))


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues, descending and not negative, shape (in_features,), and eigenvectors as columns."""

    values: torch.Tensor
    vectors: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor) -> Spectrum:
        """Decompose a symmetric matrix, shape (in_features, in_features)."""
        values, vectors = torch.linalg.eigh(gram.double())
        return cls(values.flip(0).clamp_min(0), vectors.flip(1))

    def leading(self, kept: int) -> GramFactor:
        """Keep the largest eigenvalues.

        Args:
            kept: How many.
        """
        width, total = len(self.values), self.values.sum().item()
        left_out = self.values[kept:].sum().item()
        tail = left_out / (width - kept) if kept < width else 0.0
        return GramFactor(
            rows=(self.vectors[:, :kept] * (self.values[:kept] - tail).sqrt()).T.contiguous(),
            tail=tail,
            energy=1 - left_out / total if total > 0 else 1.0,
        )


def ranks_within(
    spectra: Mapping[Key, torch.Tensor], max_bytes: int, importance: Mapping[Key, float] | None = None
) -> dict[Key, int]:
    """Deal out a budget of bytes over eigenvectors, those that bring most for each byte first.

    An eigenvector costs two bytes a feature. It counts by the root of its share of the energy, that is by length of
    features and not by their square: measured on Toyland, that loses less than counting energy.

    Args:
        spectra: Eigenvalues of each Gram matrix, descending, shape (in_features,).
        max_bytes: Of all rows together, as float16.
        importance: Factor on what the eigenvectors of each matrix count; 1 by default.

    Returns:
        How many rows to keep of each; eigenvalues of zero are never kept.
    """
    ranks = dict.fromkeys(spectra, 0)
    gains = {key: _gains(values, 1.0 if importance is None else importance[key]) for key, values in spectra.items()}
    queue = [(-gain[0], number, key) for number, (key, gain) in enumerate(gains.items()) if gain]
    heapq.heapify(queue)
    left = max_bytes
    while queue:
        _, number, key = heapq.heappop(queue)
        cost = _BYTES * len(spectra[key])
        if cost <= left:
            left -= cost
            ranks[key] += 1
            if ranks[key] < len(gains[key]):
                heapq.heappush(queue, (-gains[key][ranks[key]], number, key))
    return ranks


def _gains(values: torch.Tensor, importance: float) -> Sequence[float]:
    """What every further eigenvector brings for each byte, largest first; empty of a zero matrix."""
    total = values.sum()
    useful = values[values > values.max() * 1e-14]
    return (importance * (useful / total).sqrt() / (_BYTES * len(values))).tolist() if total > 0 else []
