"""Compress Gram matrices to their leading eigenvectors, so that statistics are small enough to publish."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from diffusers_mixofshow.fusion.gram import Gram, GramFactor


Key = TypeVar("Key")

_BYTES = 2  # bytes of a float16 value
_FEW, _OVERSAMPLED, _ITERATIONS = 4, 16, 4  # subspace iteration: used below 1/4 of the width, extra columns, steps


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and leading eigenvectors of a symmetric matrix.

    Args:
        values: Descending, not negative, shape (in_features,); values without a vector are replaced by their mean.
        vectors: As columns, shape (in_features, known); in float32 where not all are known.
    """

    values: torch.Tensor
    vectors: torch.Tensor

    @classmethod
    def of(cls, gram: Gram, known: int | None = None) -> Spectrum:
        """Decompose a Gram matrix; the rows of a `GramFactor` are orthogonal, so its spectrum is read off.

        Args:
            gram: Shape (in_features, in_features).
            known: How many leading vectors are wanted; by default all. A few are found by subspace iteration
                (arXiv:0909.4061, algorithm 4.4), ten times as fast as a full decomposition of 1280 x 1280.
        """
        width = gram.width
        if isinstance(gram, GramFactor):
            squares = gram.rows.double().square().sum(dim=1)
            rows = gram.rows.double() / squares.sqrt().clamp_min(torch.finfo(torch.float64).tiny)[:, None]
            rest = torch.full((width - len(squares),), gram.tail, dtype=torch.float64)
            return cls(torch.cat([squares + gram.tail, rest]), rows.T)
        matrix = gram.matrix()
        if known is None or width < _FEW * known:
            values, vectors = torch.linalg.eigh(matrix)
            return cls(values.flip(0).clamp_min(0), vectors.flip(1)[:, :known])
        values, vectors = _find_leading(matrix, known)
        rest = (matrix.trace() - values.sum()).clamp_min(0) / (width - known)
        return cls(torch.cat([values, rest.expand(width - known)]), vectors)

    def leading(self, kept: int) -> GramFactor:
        """Approximate the matrix by its leading eigenvectors: so many, or all that are known."""
        kept = min(kept, self.vectors.shape[1])
        width, total = len(self.values), self.values.sum().item()
        left_out = self.values[kept:].sum().item()
        tail = left_out / (width - kept) if kept < width else 0.0
        return GramFactor(
            rows=(self.vectors[:, :kept] * (self.values[:kept] - tail).clamp_min(0).sqrt()).T.contiguous(),
            tail=tail,
            energy=1 - left_out / total if total > 0 else 1.0,
        )


def _find_leading(gram: torch.Tensor, known: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest eigenvalues and their vectors by subspace iteration; seeded, hence reproducible."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(gram), known + _OVERSAMPLED, generator=generator, dtype=torch.float64).to(gram)
    for _ in range(_ITERATIONS):
        block = torch.linalg.qr(gram @ block).Q
    values, vectors = torch.linalg.eigh(block.T @ gram @ block)
    return values.flip(0)[:known].clamp_min(0), (block @ vectors.flip(1)[:, :known]).float()


def most_rows(widths: Sequence[int], max_bytes: int) -> int:
    """How many eigenvectors of one matrix to compute when all matrices share a budget: four times the average.

    Args:
        widths: in_features of every matrix.
        max_bytes: As in `allocate_ranks`.
    """
    return max(64, 4 * max_bytes // (_BYTES * max(1, sum(widths))))


def allocate_ranks(
    spectra: Mapping[Key, torch.Tensor], max_bytes: int, importance: Mapping[Key, float] | None = None
) -> dict[Key, int]:
    """Share a budget of bytes among matrices, greedily by the gain of the next eigenvector per byte.

    An eigenvector costs two bytes a feature. Its gain is the square root of its share of the trace: on Toyland that
    loses less than the share itself.

    Args:
        spectra: Eigenvalues of each Gram matrix, descending, shape (in_features,).
        max_bytes: Size of all rows together, as float16.
        importance: Factor on the gains of each matrix; 1 by default.

    Returns:
        How many rows to keep of each matrix; eigenvalues of zero are never kept.
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
    """Gain per byte of every further eigenvector, descending; empty for a zero matrix."""
    total = values.sum()
    useful = values[values > values.max() * 1e-14]
    return (importance * (useful / total).sqrt() / (_BYTES * len(values))).tolist() if total > 0 else []
