"""Gram matrices as low-rank factors, so that a concept's statistics fit beside its LoRA."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch


Key = TypeVar("Key")

_BYTES = 2  # of a float16 value
_FEW, _OVERSAMPLED, _ITERATIONS = 4, 16, 4  # of subspace iteration


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

    def applied(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ gram()`` without the matrix, at a cost linear in the width.

        Args:
            rows: Shape (n, in_features), float64.
        """
        factor = self.rows.to(rows)
        return (rows @ factor.T) @ factor + self.tail * rows

    @property
    def mean(self) -> float:
        """Mean of the diagonal."""
        return float(self.rows.double().square().sum() / self.rows.shape[1]) + self.tail

    def add_to(self, total: torch.Tensor, weight: float) -> None:
        """``total += weight * gram()``, in place and without another matrix.

        Args:
            total: Shape (in_features, in_features), float64.
            weight: Its factor.
        """
        factor = self.rows.to(total)
        total.addmm_(factor.T, factor, alpha=weight)
        total.diagonal().add_(weight * self.tail)

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


def matrix_of(gram: torch.Tensor | GramFactor) -> torch.Tensor:
    """The matrix itself, shape (in_features, in_features), float64."""
    return gram.gram() if isinstance(gram, GramFactor) else gram


class GramSum:
    """A weighted sum of Gram matrices: a matrix, or a factor where the layer is wide and every summand is one."""

    def __init__(self, width: int, device: str | torch.device, *, as_matrix: bool) -> None:
        """Start with nothing.

        Args:
            width: Features of the layer's input.
            device: Of the matrix.
            as_matrix: Make a matrix of it whatever is added.
        """
        self._width, self._device = width, device
        self._matrix = self._zeros() if as_matrix else None
        self._factors: list[tuple[GramFactor, float]] = []

    def add(self, gram: torch.Tensor | GramFactor, weight: float) -> None:
        """Add ``weight * gram``."""
        if isinstance(gram, GramFactor) and self._matrix is None:
            self._factors.append((gram, weight))
            return
        if self._matrix is None:
            self._matrix, earlier = self._zeros(), self._factors
            for factor, share in earlier:
                factor.add_to(self._matrix, share)
        if isinstance(gram, GramFactor):
            gram.add_to(self._matrix, weight)
        else:
            self._matrix.add_(gram, alpha=weight)

    @property
    def value(self) -> torch.Tensor | GramFactor:
        """The sum, shape (in_features, in_features), float64, or its factor; zeros if nothing was added."""
        if self._matrix is None and self._factors:
            return GramFactor.summed(*zip(*self._factors, strict=True))
        return self._zeros() if self._matrix is None else self._matrix

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(self._width, self._width, dtype=torch.float64, device=self._device)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and leading eigenvectors of a symmetric matrix.

    Args:
        values: Descending and not negative, shape (in_features,); those without a vector are their mean.
        vectors: As columns, shape (in_features, known); in float32 where not all are known.
    """

    values: torch.Tensor
    vectors: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor, known: int | None = None) -> Spectrum:
        """Decompose a symmetric matrix.

        Args:
            gram: Shape (in_features, in_features).
            known: How many leading vectors are wanted; by default all. Where they are few, they are found by subspace
                iteration (arXiv:0909.4061, algorithm 4.4), which is ten times as fast as decomposing 1280 x 1280.
        """
        gram, width = gram.double(), len(gram)
        if known is None or width < _FEW * known:
            values, vectors = torch.linalg.eigh(gram)
            return cls(values.flip(0).clamp_min(0), vectors.flip(1)[:, :known])
        values, vectors = _leading(gram, known)
        rest = (gram.trace() - values.sum()).clamp_min(0) / (width - known)
        return cls(torch.cat([values, rest.expand(width - known)]), vectors)

    @classmethod
    def of_factor(cls, factor: GramFactor) -> Spectrum:
        """The spectrum that a factor with orthogonal rows stands for."""
        squares, width = factor.rows.double().square().sum(dim=1), factor.rows.shape[1]
        rows = factor.rows.double() / squares.sqrt().clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        rest = torch.full((width - len(squares),), factor.tail, dtype=torch.float64)
        return cls(torch.cat([squares + factor.tail, rest]), rows.T)

    def leading(self, kept: int) -> GramFactor:
        """Keep the largest eigenvalues.

        Args:
            kept: How many; no more than there are vectors.
        """
        kept = min(kept, self.vectors.shape[1])
        width, total = len(self.values), self.values.sum().item()
        left_out = self.values[kept:].sum().item()
        tail = left_out / (width - kept) if kept < width else 0.0
        return GramFactor(
            rows=(self.vectors[:, :kept] * (self.values[:kept] - tail).clamp_min(0).sqrt()).T.contiguous(),
            tail=tail,
            energy=1 - left_out / total if total > 0 else 1.0,
        )


def _leading(gram: torch.Tensor, known: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest eigenvalues and their vectors by subspace iteration, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(gram), known + _OVERSAMPLED, generator=generator, dtype=torch.float64).to(gram)
    for _ in range(_ITERATIONS):
        block = torch.linalg.qr(gram @ block).Q
    values, vectors = torch.linalg.eigh(block.T @ gram @ block)
    return values.flip(0)[:known].clamp_min(0), (block @ vectors.flip(1)[:, :known]).float()


def most_rows(widths: Sequence[int], max_bytes: int) -> int:
    """How many eigenvectors of one matrix are worth knowing if all matrices share a budget: four times the average.

    Args:
        widths: of all matrices.
        max_bytes: As in `ranks_within`.
    """
    return max(64, 4 * max_bytes // (_BYTES * max(1, sum(widths))))


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
