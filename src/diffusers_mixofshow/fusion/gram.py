"""Gram matrices of layer inputs, dense or as low-rank factors, behind one interface."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

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


@dataclass(frozen=True)
class Inverse:
    """(G + lambda I)^-1 of one `Gram`; for lambda = 0 of a singular one, its pseudo-inverse.

    Args:
        condition: Condition number of G + lambda I: the factor by which relative errors can grow in a solution.
        multiply: Multiplies rows by the inverse, shape (n, in_features), float64.
    """

    condition: float
    multiply: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Gram(ABC):
    """G = X X^T / tokens of features X of one input, (in_features, in_features), float64.

    It is symmetric and positive semi-definite. A ridge is lambda as a fraction of the mean diagonal of G.

    Args:
        rows: What is stored, shape (n, in_features).
        tail: t, where the matrix is stored as G = F^T F + t I; 0 for a dense matrix.
        energy: Share of the recorded matrix's trace that the rows keep, 0 to 1.
    """

    rows: torch.Tensor
    tail: float = 0.0
    energy: float = 1.0

    @property
    def width(self) -> int:
        """The number of features."""
        return self.rows.shape[1]

    @property
    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor Inf."""
        return bool(self.rows.isfinite().all())

    def to(self, device: Device) -> Self:
        """The same on a device."""
        return replace(self, rows=self.rows.to(device))

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
    def inverse(self, ridge: float) -> Inverse:
        """(G + lambda I)^-1.

        Raises:
            FusionError: If G + lambda I is numerically singular although the ridge is above 0.
        """

    @abstractmethod
    def solve(self, rows: torch.Tensor, ridges: Sequence[float]) -> Iterator[torch.Tensor]:
        """``rows (G + lambda I)^-1`` for each of many ridges, (n, in_features); G is decomposed only once."""


class DenseGram(Gram):
    """A Gram matrix stored in full: its rows are (in_features, in_features), float64."""

    def matrix(self) -> torch.Tensor:
        """The matrix itself."""
        return self.rows

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ G``."""
        return rows @ self.rows

    def inner_products(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Gram.inner_products`."""
        return rows @ self.rows @ rows.T

    def add_to(self, total: torch.Tensor, weight: float) -> None:
        """``total += weight * G``."""
        total.add_(self.rows, alpha=weight)

    def inverse(self, ridge: float) -> Inverse:
        """By Cholesky's decomposition; a ridge of 0 gives the pseudo-inverse, hence the solution of minimum norm."""
        damped = self.rows.clone()
        if ridge == 0:
            inverse = torch.linalg.pinv(damped, hermitian=True)
        else:
            damped.diagonal().add_(ridge * damped.diagonal().mean().clamp_min(torch.finfo(damped.dtype).tiny))
            lower, failure = torch.linalg.cholesky_ex(damped)
            if failure.item() or not lower.isfinite().all():
                raise FusionError(
                    f"The features' Gram matrix ({self.width} x {self.width}) cannot be inverted with ridge={ridge:g}."
                    " Expected finite features and a ridge of 1e-12 or more; check the concepts for NaN or raise the "
                    "ridge."
                )
            inverse = torch.cholesky_inverse(lower)
        condition = torch.linalg.matrix_norm(damped, ord=1) * torch.linalg.matrix_norm(inverse, ord=1)
        return Inverse(float(condition), lambda rows: rows @ inverse)

    def solve(self, rows: torch.Tensor, ridges: Sequence[float]) -> Iterator[torch.Tensor]:
        """With G = V diag(s) V^T: rows V diag(1 / (s + lambda)) V^T."""
        values, vectors = self._spectrum
        turned = rows @ vectors
        for ridge in ridges:
            yield turned / (values + ridge * values.mean()) @ vectors.T

    @cached_property
    def _spectrum(self) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(self.rows)
        return values.clamp_min(0), vectors


class GramFactor(Gram):
    """A Gram matrix approximated as F^T F + tail I, at a cost that is linear in the width.

    Row k of F, shape (kept, in_features), is eigenvector k times sqrt(eigenvalue k - tail), leading ones first. The
    tail is the mean of the eigenvalues that were left out: the trace is kept, and the directions left out count
    equally instead of not at all.
    """

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

    def inverse(self, ridge: float) -> Inverse:
        """By Woodbury's identity, without any matrix of shape (in_features, in_features).

        (F^T F + t I)^-1 = (I - F^T (F F^T + t I)^-1 F) / t; for t = 0 the pseudo-inverse is F^T ((F F^T)^+)^2 F.
        """
        factor, damping = self.rows.double(), self.tail + ridge * self._mean
        if damping == 0:
            inner = torch.linalg.pinv(self._core, hermitian=True)
            inner = inner @ inner
            return Inverse(float("inf"), lambda rows: ((rows @ factor.T) @ inner) @ factor)
        damped = self._core.clone()
        damped.diagonal().add_(damping)
        inner = -torch.cholesky_inverse(torch.linalg.cholesky(damped)) / damping
        condition = (_largest_eigenvalue(self._core) + damping) / damping
        return Inverse(condition, lambda rows: rows / damping + ((rows @ factor.T) @ inner) @ factor)

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
            total = torch.zeros(gram.width, gram.width, dtype=torch.float64, device=gram.rows.device)
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
