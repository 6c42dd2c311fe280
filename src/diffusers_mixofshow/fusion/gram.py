"""Gram matrices of layer inputs, dense or as low-rank factors, behind one interface."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from diffusers_mixofshow.errors import FusionError


Device = str | torch.device

_BLOCK = 128
"""Rows that `multiply_by_transpose` multiplies at once: fewer do less work twice, but multiply more slowly."""


def multiply_by_transpose(rows: torch.Tensor) -> torch.Tensor:
    """``rows @ rows.T``, (n, n): the lower blocks are multiplied, the upper ones copied from them.

    Args:
        rows: Shape (n, features).
    """
    products = rows.new_empty(len(rows), len(rows))
    for start in range(0, len(rows), _BLOCK):
        stop = start + _BLOCK
        products[start:stop, :stop] = rows[start:stop] @ rows[:stop].T
        products[:start, start:stop] = products[start:stop, :start].T
    return products


class Inverse(ABC):
    """(G + lambda I)^-1 of one `Gram`; for lambda = 0 of a singular one, its pseudo-inverse."""

    condition: float
    """Condition number of G + lambda I: the factor by which relative errors can grow in a solution."""

    @abstractmethod
    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` times the inverse, shape (n, in_features), float64."""


class Gram(ABC):
    """G = X X^T / tokens of features X of one input, (in_features, in_features), float64.

    It is symmetric and positive semi-definite. A ridge is lambda as a fraction of the mean diagonal of G.
    """

    tail: float
    """t, where the matrix is stored as G = F^T F + t I; 0 for a dense matrix."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The number of features."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it is."""

    @property
    @abstractmethod
    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor Inf."""

    @abstractmethod
    def matrix(self) -> torch.Tensor:
        """The matrix itself, shape (in_features, in_features), float64."""

    @abstractmethod
    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ matrix()``, shape (n, in_features), float64."""

    @abstractmethod
    def inner_products(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ (matrix() - tail I) @ rows.T``, shape (n, n), float64."""

    @abstractmethod
    def add_to(self, total: torch.Tensor, weight: float) -> None:
        """``total += weight * matrix()``, in place and without another matrix; ``total`` is float64."""

    @abstractmethod
    def to(self, device: Device) -> Gram:
        """The same on a device."""

    @abstractmethod
    def inverse(self, ridge: float) -> Inverse:
        """(G + lambda I)^-1.

        Raises:
            FusionError: If G + lambda I is numerically singular although the ridge is above 0.
        """

    @abstractmethod
    def solve(self, rows: torch.Tensor, ridges: Sequence[float]) -> Iterator[torch.Tensor]:
        """``rows (G + lambda I)^-1`` for each of many ridges, (n, in_features); G is decomposed only once."""


@dataclass(frozen=True)
class DenseGram(Gram):
    """A Gram matrix stored in full.

    Args:
        values: Shape (in_features, in_features), float64.
    """

    values: torch.Tensor
    tail = 0.0

    @property
    def width(self) -> int:
        """The number of features."""
        return len(self.values)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.values.device

    @property
    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor Inf."""
        return bool(self.values.isfinite().all())

    def matrix(self) -> torch.Tensor:
        """The matrix itself."""
        return self.values

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ G``."""
        return rows @ self.values

    def inner_products(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Gram.inner_products`."""
        return rows @ self.values @ rows.T

    def add_to(self, total: torch.Tensor, weight: float) -> None:
        """``total += weight * G``."""
        total.add_(self.values, alpha=weight)

    def to(self, device: Device) -> DenseGram:
        """The same on a device."""
        return DenseGram(self.values.to(device))

    def inverse(self, ridge: float) -> Inverse:
        """By Cholesky's decomposition; a ridge of 0 gives the pseudo-inverse, hence the solution of minimum norm."""
        damped = self.values.clone()
        if ridge == 0:
            return _DenseInverse(damped, torch.linalg.pinv(damped, hermitian=True))
        damped.diagonal().add_(ridge * damped.diagonal().mean().clamp_min(torch.finfo(damped.dtype).tiny))
        lower, failure = torch.linalg.cholesky_ex(damped)
        if failure.item() or not lower.isfinite().all():
            raise FusionError(
                f"The features' Gram matrix ({self.width} x {self.width}) cannot be inverted with ridge={ridge:g}. "
                "Expected finite features and a ridge of 1e-12 or more; check the concepts for NaN or raise the ridge."
            )
        return _DenseInverse(damped, torch.cholesky_inverse(lower))

    def solve(self, rows: torch.Tensor, ridges: Sequence[float]) -> Iterator[torch.Tensor]:
        """With G = V diag(s) V^T: rows V diag(1 / (s + lambda)) V^T."""
        values, vectors = self._spectrum
        turned = rows @ vectors
        for ridge in ridges:
            yield turned / (values + ridge * values.mean()) @ vectors.T

    @cached_property
    def _spectrum(self) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(self.values)
        return values.clamp_min(0), vectors


class _DenseInverse(Inverse):
    def __init__(self, matrix: torch.Tensor, inverse: torch.Tensor) -> None:
        """Keep the inverse M^-1 and the condition number |M|_1 |M^-1|_1."""
        self._inverse = inverse
        self.condition = float(torch.linalg.matrix_norm(matrix, ord=1) * torch.linalg.matrix_norm(inverse, ord=1))

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self._inverse


@dataclass(frozen=True, kw_only=True)
class GramFactor(Gram):
    """A Gram matrix approximated as F^T F + tail I, at a cost that is linear in the width.

    Args:
        rows: F, shape (kept, in_features): row k is eigenvector k times sqrt(eigenvalue k - tail), leading ones first.
        tail: t, the mean of the eigenvalues that were left out: the trace is kept, and the directions left out count
            equally instead of not at all.
        energy: Share of the trace that the rows keep, 0 to 1.
    """

    rows: torch.Tensor
    tail: float
    energy: float

    @property
    def width(self) -> int:
        """The number of features."""
        return self.rows.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.rows.device

    @property
    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor Inf."""
        return bool(self.rows.isfinite().all())

    def matrix(self) -> torch.Tensor:
        """The approximation."""
        rows = self.rows.double()
        return rows.T @ rows + self.tail * torch.eye(self.width, dtype=torch.float64, device=rows.device)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ G``; the matrix is never formed."""
        factor = self.rows.to(rows)
        return (rows @ factor.T) @ factor + self.tail * rows

    def inner_products(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Gram.inner_products`; the matrix is never formed."""
        return multiply_by_transpose(rows @ self.rows.to(rows).T)

    def add_to(self, total: torch.Tensor, weight: float) -> None:
        """``total += weight * G``."""
        factor = self.rows.to(total)
        total.addmm_(factor.T, factor, alpha=weight)
        total.diagonal().add_(weight * self.tail)

    def to(self, device: Device) -> GramFactor:
        """The same on a device."""
        return GramFactor(rows=self.rows.to(device), tail=self.tail, energy=self.energy)

    def inverse(self, ridge: float) -> Inverse:
        """By Woodbury's identity; no matrix of shape (in_features, in_features) is formed."""
        rows, damping = self.rows.double(), self.tail + ridge * self._mean
        if damping == 0:
            squared = torch.linalg.pinv(self._core, hermitian=True)
            return _FactorInverse(rows, squared @ squared, damping, float("inf"))
        damped = self._core.clone()
        damped.diagonal().add_(damping)
        inner = -torch.cholesky_inverse(torch.linalg.cholesky(damped)) / damping
        return _FactorInverse(rows, inner, damping, (_largest_eigenvalue(self._core) + damping) / damping)

    def solve(self, rows: torch.Tensor, ridges: Sequence[float]) -> Iterator[torch.Tensor]:
        """By Woodbury's identity for each ridge; F F^T, nearly all of the work, is computed once."""
        return (self.inverse(ridge).multiply(rows) for ridge in ridges)

    @cached_property
    def _core(self) -> torch.Tensor:
        """F F^T, (kept, kept)."""
        return multiply_by_transpose(self.rows.double())

    @property
    def _mean(self) -> float:
        """Mean of the diagonal."""
        return float(self._core.trace() / self.width) + self.tail


class _FactorInverse(Inverse):
    """(F^T F + t I)^-1 = (I - F^T (F F^T + t I)^-1 F) / t."""

    def __init__(self, rows: torch.Tensor, inner: torch.Tensor, damping: float, condition: float) -> None:
        """Keep the factors.

        Args:
            rows: F, shape (rows, in_features), float64.
            inner: The matrix between F^T and F, (rows, rows): -(F F^T + t I)^-1 / t; for t = 0 the square of the
                pseudo-inverse of F F^T, which gives the pseudo-inverse of F^T F.
            damping: t.
            condition: Largest eigenvalue of the inverted matrix divided by its smallest.
        """
        self._rows, self._inner, self._damping, self.condition = rows, inner, damping, condition

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        changed = ((rows @ self._rows.T) @ self._inner) @ self._rows
        return changed if self._damping == 0 else rows / self._damping + changed


def _largest_eigenvalue(matrix: torch.Tensor, steps: int = 30) -> float:
    """Largest eigenvalue of a positive semi-definite matrix by power iteration, for a condition number."""
    vector = torch.ones(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(steps):
        vector = matrix @ torch.nn.functional.normalize(vector, dim=0)
    return float(vector.norm())


def sum_grams(weighted: Iterable[tuple[Gram, float]], *, as_matrix: bool = False) -> Gram:
    """Add Gram matrices up, one at a time: factors alone are stacked into one factor, otherwise the sum is dense.

    A lone matrix of weight 1 is returned as it is.

    Args:
        weighted: Matrices of one width, at least one, and their weights, above 0.
        as_matrix: Sum factors densely, too; smaller than the stack where many factors of a narrow layer are added.
    """
    pairs = iter(weighted)
    first = next(pairs)
    second = list(itertools.islice(pairs, 1))
    if not second and first[1] == 1 and not (as_matrix and isinstance(first[0], GramFactor)):
        return first[0]
    factors: list[tuple[GramFactor, float]] = []
    total: torch.Tensor | None = None
    for gram, weight in itertools.chain([first], second, pairs):
        if isinstance(gram, GramFactor) and total is None and not as_matrix:
            factors.append((gram, weight))
            continue
        if total is None:
            total = torch.zeros(gram.width, gram.width, dtype=torch.float64, device=gram.device)
            for factor, share in factors:
                factor.add_to(total, share)
        gram.add_to(total, weight)
    if total is not None:
        return DenseGram(total)
    rows = torch.cat([factor.rows.double() for factor, _ in factors])
    for block, (_, weight) in zip(rows.split([len(factor.rows) for factor, _ in factors]), factors, strict=True):
        block.mul_(weight**0.5)
    return GramFactor(
        rows=rows,
        tail=sum(weight * factor.tail for factor, weight in factors),
        energy=min(factor.energy for factor, _ in factors),
    )
