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
        gram: G.
        condition: Condition number of G + lambda I: the factor by which relative errors can grow in a solution.
        apply: Multiplies rows, (n, in_features), whose `Gram.image` is given; returns the product and its image.
    """

    gram: Gram
    condition: float
    apply: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ (G + lambda I)^-1``, shape (n, in_features), float64."""
        return self.apply(rows, self.gram.image(rows))[0]


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
    def image(self, rows: torch.Tensor) -> torch.Tensor:
        """What products with rows need of them: ``rows @ F.T``, (n, kept), float64; for a dense matrix, the rows.

        With a low-rank matrix it is most of the work, and taken once for all products.
        """

    @abstractmethod
    def inner_products(self, image: torch.Tensor) -> torch.Tensor:
        """``rows @ (matrix() - tail I) @ rows.T`` of the rows with this `image`, shape (n, n), float64."""

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

    def image(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows."""
        return rows

    def inner_products(self, image: torch.Tensor) -> torch.Tensor:
        """See `Gram.inner_products`."""
        return image @ self.rows @ image.T

    def add_to(self, total: torch.Tensor, weight: float) -> None:
        """``total += weight * G``."""
        total.add_(self.rows, alpha=weight)

    def inverse(self, ridge: float) -> Inverse:
        """By Cholesky's decomposition; a ridge of 0 gives the pseudo-inverse, hence the solution of minimum norm."""
        damped = self.rows.clone()
        if ridge == 0:
            inverse = torch.linalg.pinv(damped, hermitian=True)
        else:
            damped.diagonal().add_(_damp(damped.diagonal(), ridge))
            inverse = torch.cholesky_inverse(_decompose(damped, self.width, ridge))
        condition = torch.linalg.matrix_norm(damped, ord=1) * torch.linalg.matrix_norm(inverse, ord=1)
        return Inverse(self, float(condition), lambda rows, image: (rows @ inverse,) * 2)

    def solve(self, rows: torch.Tensor, ridges: Sequence[float]) -> Iterator[torch.Tensor]:
        """With G = V diag(s) V^T: rows V diag(1 / (s + lambda)) V^T."""
        values, vectors = self._spectrum
        turned = rows @ vectors
        for ridge in ridges:
            yield turned / (values + _damp(values, ridge)) @ vectors.T

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
        return torch.addmm(rows, self.image(rows), self.rows.to(rows), beta=self.tail)

    def image(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ F.T``."""
        return rows @ self.rows.to(rows).T

    def inner_products(self, image: torch.Tensor) -> torch.Tensor:
        """See `Gram.inner_products`."""
        return multiply_by_transpose(image)

    def add_to(self, total: torch.Tensor, weight: float) -> None:
        """``total += weight * G``."""
        factor = self.rows.to(total)
        total.addmm_(factor.T, factor, alpha=weight)
        total.diagonal().add_(weight * self.tail)

    def inverse(self, ridge: float) -> Inverse:
        """By Woodbury's identity, without any matrix of shape (in_features, in_features).

        R (F^T F + t I)^-1 = (R - S F) / t, with the image S = R F^T (F F^T + t I)^-1; for t = 0 the pseudo-inverse is
        F^T ((F F^T)^+)^2 F.
        """
        factor, damping = self.rows.double(), self.tail + ridge * self._mean
        if damping == 0:
            inner = torch.linalg.pinv(self.core, hermitian=True)
            return Inverse(self, float("inf"), lambda rows, image: (image @ inner @ inner @ factor, image @ inner))
        damped = self.core.clone()
        damped.diagonal().add_(damping)
        lower = _decompose(damped, self.width, ridge)

        def apply(rows: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            solved = torch.cholesky_solve(image.T, lower).T
            return torch.addmm(rows, solved, factor, beta=1 / damping, alpha=-1 / damping), solved

        return Inverse(self, (_largest_eigenvalue(self.core) + damping) / damping, apply)

    def solve(self, rows: torch.Tensor, ridges: Sequence[float]) -> Iterator[torch.Tensor]:
        """By Woodbury's identity for each ridge; F F^T, nearly all of the work, is computed once."""
        return (self.inverse(ridge).multiply(rows) for ridge in ridges)

    @cached_property
    def core(self) -> torch.Tensor:
        """F F^T, (kept, kept)."""
        return multiply_by_transpose(self.rows.double())

    @property
    def _mean(self) -> float:
        """Mean of the diagonal."""
        return float(self.core.trace() / self.width) + self.tail


def _damp(diagonal: torch.Tensor, ridge: float) -> torch.Tensor:
    """The ridge as a fraction of the mean of the diagonal; above 0 for inputs that were always zero, too."""
    return (ridge * diagonal.mean()).clamp_min(torch.finfo(diagonal.dtype).tiny)


def _decompose(damped: torch.Tensor, width: int, ridge: float) -> torch.Tensor:
    """Cholesky's factor of a damped matrix of inputs of `width` features.

    Raises:
        FusionError: If it is numerically singular, or not finite.
    """
    lower, failure = torch.linalg.cholesky_ex(damped)
    if failure.item() or not lower.isfinite().all():
        raise FusionError(
            f"The features' Gram matrix ({width} x {width}) cannot be inverted with ridge={ridge:g}. Expected finite "
            "features and a ridge of 1e-12 or more; check the concepts for NaN or raise the ridge."
        )
    return lower


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
    sizes = [len(factor.rows) for factor, _ in factors]
    rows = first[0].rows.new_empty(sum(sizes), first[0].width, dtype=torch.float64)
    for block, (factor, weight) in zip(rows.split(sizes), factors, strict=True):
        torch.mul(factor.rows.double(), weight**0.5, out=block)
    return GramFactor(
        rows=rows,
        tail=sum(weight * factor.tail for factor, weight in factors),
        energy=min(factor.energy for factor, _ in factors),
    )
