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


def ranks_within(spectra: Mapping[Key, torch.Tensor], max_bytes: int) -> dict[Key, int]:
    """Deal out a budget of bytes so that the mean share of energy kept is as large as it can be.

    An eigenvector costs two bytes a feature, whatever it brings; the dearest by energy for each byte come first.

    Args:
        spectra: Eigenvalues of each Gram matrix, descending, shape (in_features,).
        max_bytes: Of all rows together, as float16.

    Returns:
        How many rows to keep of each; eigenvalues of zero are never kept.
    """
    ranks = dict.fromkeys(spectra, 0)
    gains = {key: _gains(values) for key, values in spectra.items()}
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


def _gains(values: torch.Tensor) -> Sequence[float]:
    """Share of energy for each byte that every further eigenvector brings, largest first; empty of a zero matrix."""
    total = values.sum()
    useful = values[values > values.max() * 1e-14]
    return (useful / total / (_BYTES * len(values))).tolist() if total > 0 else []
