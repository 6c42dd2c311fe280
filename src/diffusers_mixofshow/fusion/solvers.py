"""Gradient fusion as linear algebra: pure functions of Gram matrices and low-rank factors, float64 inside.

Notation, as in arXiv:2305.18292 section 3.3.2: concept i changes a layer's weight W0 by dW_i = B_i A_i, and meets the
inputs X_i (features as columns). Here up_i = B_i, down_i = s_i A_i with the LoRA's scaling s_i in it, and
gram_i = X_i X_i^T. An update D = W - W0 is always a pair of factors, D = up @ down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.fusion.compression import GramFactor


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A low-rank update ``up @ down`` of one layer's weight, every scaling already in it.

    Args:
        down: The paper's s A, shape (rank, in_features); rank 0 is an update of nothing.
        up: The paper's B, shape (out_features, rank).
    """

    down: torch.Tensor
    up: torch.Tensor

    def to(self, device: str | torch.device) -> Factors:
        """The same update on a device."""
        return Factors(down=self.down.to(device), up=self.up.to(device))

    @property
    def delta(self) -> torch.Tensor:
        """The dense update, shape (out_features, in_features)."""
        return self.up @ self.down

    @cached_property
    def outer(self) -> torch.Tensor:
        """Inner products of the rows of `down`, shape (rank, rank), float64."""
        return self.down.double() @ self.down.double().T

    @cached_property
    def inner(self) -> torch.Tensor:
        """Inner products of the columns of `up`, shape (rank, rank), float64."""
        return self.up.double().T @ self.up.double()


def factorise(grams: Sequence[torch.Tensor], ridge: float) -> torch.Tensor:
    """Invert sum_i G_i + lambda I once for all layers that read the same inputs.

    Args:
        grams: One Gram matrix per concept, each (in_features, in_features).
        ridge: lambda as a fraction of the mean diagonal of the sum; dimensionless. 0 takes the pseudo-inverse,
            that is the solution of minimum norm.

    Returns:
        The symmetric inverse, shape (in_features, in_features), float64.

    Raises:
        FusionError: If the matrix is numerically singular in spite of a ridge.
    """
    total = grams[0].double().clone()
    for gram in grams[1:]:
        total += gram.double()
    if ridge == 0:
        return torch.linalg.pinv(total, hermitian=True)
    damping = ridge * total.diagonal().mean().clamp_min(torch.finfo(total.dtype).tiny)
    total.diagonal().add_(damping)  # the sum above is a matrix of our own
    lower, failure = torch.linalg.cholesky_ex(total)
    if failure.item() or not lower.isfinite().all():
        raise FusionError(
            f"The features' Gram matrix ({len(total)} x {len(total)}) cannot be inverted with ridge={ridge:g}. "
            "Expected finite features and a ridge of 1e-12 or more; check the concepts for NaN or raise the ridge."
        )
    return torch.cholesky_inverse(lower)


class FactorInverter:
    """Inverts F^T F + (tail + lambda) I for any lambda, without a matrix of the layer's width.

    Args:
        gram: F, of far fewer rows than features, and tail.
        device: Where it inverts.
    """

    def __init__(self, gram: GramFactor, device: str | torch.device = "cpu") -> None:
        """Take the inner products of the rows of F, (rows, rows), which is nearly all of the work."""
        self._gram, self._rows = gram, gram.rows.to(device).double()
        self._core = self._rows @ self._rows.T

    def inverse(self, ridge: float) -> InverseOfFactor:
        """The inverse for one ridge.

        Args:
            ridge: lambda as a fraction of the mean diagonal, as in `factorise`.
        """
        damping = self._gram.tail + ridge * self._gram.mean
        if damping == 0:
            squared = torch.linalg.pinv(self._core, hermitian=True)
            return InverseOfFactor(self._rows, squared @ squared, damping, float("inf"))
        damped = self._core.clone()
        damped.diagonal().add_(damping)
        lower = torch.linalg.cholesky(damped)
        condition = (_largest_eigenvalue(self._core) + damping) / damping
        return InverseOfFactor(self._rows, -torch.cholesky_inverse(lower) / damping, damping, condition)


@dataclass(frozen=True)
class InverseOfFactor:
    """An inverse as Woodbury's identity has it: (F^T F + t I)^-1 = (I - F^T (F F^T + t I)^-1 F) / t.

    Args:
        rows: F, shape (rows, in_features), float64.
        inner: What stands between F^T and F, (rows, rows): -(F F^T + t I)^-1 / t; for t = 0 the square of the
            pseudo-inverse of F F^T, so that the whole is the pseudo-inverse.
        damping: t.
        condition: Largest eigenvalue of what was inverted over its smallest.
    """

    rows: torch.Tensor
    inner: torch.Tensor
    damping: float
    condition: float

    def applied(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` times the inverse, shape (n, in_features), float64."""
        changed = ((rows @ self.rows.T) @ self.inner) @ self.rows
        return changed if self.damping == 0 else rows / self.damping + changed


def _largest_eigenvalue(matrix: torch.Tensor, steps: int = 30) -> float:
    """Of a symmetric matrix without negative eigenvalues, by power iteration: close enough for a condition number."""
    vector = torch.ones(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(steps):
        vector = matrix @ torch.nn.functional.normalize(vector, dim=0)
    return float(vector.norm())


def closed_form(updates: Sequence[Factors], grams: Sequence[torch.Tensor], inverse: torch.Tensor) -> Factors:
    """The update that reproduces every concept's outputs on its own inputs, exactly as a LoRA of rank sum_i r_i.

    Minimises sum_i |dW_i X_i - D X_i|^2 + lambda |D|^2, the objective of section 3.3.2 plus a ridge. Its normal
    equation D (sum_i G_i + lambda I) = sum_i B_i s_i A_i G_i leaves the B_i as they are:
    D = [B_1 .. B_n] . stack_i(s_i A_i G_i (sum_j G_j + lambda I)^-1).

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        grams: One Gram matrix per concept, (in_features, in_features), in the same order.
        inverse: What `factorise` makes of the same Gram matrices.
    """
    return fused_update(updates, target_rows(updates, grams), inverse)


def target_rows(updates: Sequence[Factors], grams: Sequence[torch.Tensor | GramFactor]) -> torch.Tensor:
    """Right-hand side of the normal equations before B: stack_i(s_i A_i G_i), (sum_i r_i, in_features), float64.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        grams: One Gram matrix per concept, (in_features, in_features), or a factor of it, in the same order.
    """
    pairs = zip(updates, grams, strict=True)
    return torch.cat([_applied(gram, update.down.double()) for update, gram in pairs])


def _applied(gram: torch.Tensor | GramFactor, rows: torch.Tensor) -> torch.Tensor:
    return gram.applied(rows) if isinstance(gram, GramFactor) else rows @ gram.double()


def fused_update(updates: Sequence[Factors], met: torch.Tensor, inverse: torch.Tensor | InverseOfFactor) -> Factors:
    """The closed form from sums that may come from elsewhere, see `closed_form`.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        met: See `target_rows`.
        inverse: See `factorise`, or `InverseOfFactor`.
    """
    down = inverse.applied(met) if isinstance(inverse, InverseOfFactor) else met @ inverse
    return Factors(down=down, up=_beside(updates))


def weighted_average(updates: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Equation 2, W = W0 + sum_i w_i dW_i with sum_i w_i = 1, exactly as a LoRA of rank sum_i r_i.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        weights: One w_i per concept, in the same order.
    """
    downs = [weight * update.down.double() for update, weight in zip(updates, weights, strict=True)]
    return Factors(down=torch.cat(downs), up=_beside(updates))


def lbfgs(
    updates: Sequence[Factors], met: torch.Tensor, gram: torch.Tensor | GramFactor, *, steps: int, history: int = 25
) -> Factors:
    """The paper's solver (section 6.1): LBFGS with strong Wolfe line search from the base weights, stopped early.

    The objective needs no features: |dW_i X_i - D X_i|^2 summed over i is tr(D G D^T) - 2 tr(D R^T) + const, with
    G = sum_i G_i and R = sum_i dW_i G_i. Every gradient 2 (D G - R) lies in the columns of [B_1 .. B_n] when D does,
    and D starts at 0; so it is written as D = Q M, with Q an orthonormal basis of those columns, and M is optimised:
    the same iterates at a fraction of the size.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        met: See `target_rows`, (sum_i r_i, in_features).
        gram: G, (in_features, in_features), or a factor of it.
        steps: LBFGS iterations; the paper takes 500 for text layers and text keys and values, 50 for the rest.
        history: Number of past steps that the curvature is estimated from.
    """
    basis, mixing = torch.linalg.qr(_beside(updates))  # (out, rank), (rank, sum r_i)
    target = mixing @ met  # (rank, in)
    # Scaled as the reference's loss, a mean over output features: the first step of LBFGS depends on it.
    per_feature = 1 / max(1, basis.shape[0])
    moving = torch.zeros_like(target, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [moving], lr=1, max_iter=steps, history_size=history, line_search_fn="strong_wolfe", tolerance_grad=1e-12
    )

    def closure() -> torch.Tensor:
        image = _applied(gram, moving.detach())
        moving.grad = 2 * per_feature * (image - target)
        return per_feature * (moving.detach() * (image - 2 * target)).sum()

    if target.numel():
        optimiser.step(closure)
    return Factors(down=moving.detach(), up=basis)


def recompressed(update: Factors, max_rank: int) -> tuple[Factors, float]:
    """The nearest update of at most a rank, by thin QR of both factors and an SVD of the small product.

    Args:
        update: Factors (rank, in_features) and (out_features, rank).
        max_rank: At least 1.

    Returns:
        The factors, their singular values shared by both, and the share of |D|^2 that is kept.
    """
    left, inner = torch.linalg.qr(update.up)
    right, outer = torch.linalg.qr(update.down.T)
    rotation, values, turned = torch.linalg.svd(inner @ outer.T, full_matrices=False)
    kept = min(max_rank, len(values))
    energy = values.square()
    total = energy.sum().item()
    root = values[:kept].sqrt()
    small = Factors(down=root[:, None] * (turned[:kept] @ right.T), up=(left @ rotation[:, :kept]) * root)
    return small, energy[:kept].sum().item() / total if total > 0 else 1.0


def at_most_full_rank(update: Factors) -> Factors:
    """Rewrite factors of a rank above the layer's own as factors of exactly the layer's full rank; loses nothing."""
    full = min(update.up.shape[0], update.down.shape[1])
    return update if update.down.shape[0] <= full else recompressed(update, full)[0]


def relative_residual(fused: Factors, own: Factors, gram: torch.Tensor | GramFactor) -> float:
    """Relative error that fusion makes in one concept's outputs of one layer.

    sqrt( tr((D - dW_i) G_i (D - dW_i)^T) / tr(dW_i G_i dW_i^T) ) = |D X_i - dW_i X_i|_F / |dW_i X_i|_F, the root of
    the objective's i-th term relative to leaving W0 as it is; 0 is perfect, 1 no better than W0.

    Args:
        fused: The fused update D.
        own: The concept's own update dW_i.
        gram: The concept's Gram matrix G_i, (in_features, in_features), or a low-rank factor of it, which makes the
            cost linear in the width.

    Returns:
        The ratio; 0 where the concept itself changes nothing and fusion does neither, infinity where only fusion does.
    """
    together, alone, scale = _products(fused, own, gram)
    error = max(0.0, together - 2 * alone + scale)
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return (error / scale) ** 0.5


def _products(fused: Factors, own: Factors, gram: torch.Tensor | GramFactor) -> tuple[float, float, float]:
    """tr(D G D^T), tr(D G dW^T) and tr(dW G dW^T), never leaving the ranks' size."""
    wide, narrow = fused.down.double(), own.down.double()
    if isinstance(gram, GramFactor):  # G = F^T F + tail I
        rows = gram.rows.to(wide)
        seen, own_seen = wide @ rows.T, narrow @ rows.T
        squares = [
            seen @ seen.T + gram.tail * fused.outer,
            seen @ own_seen.T + gram.tail * (wide @ narrow.T),
            own_seen @ own_seen.T + gram.tail * own.outer,
        ]
    else:
        seen = wide @ gram.double()
        squares = [seen @ wide.T, seen @ narrow.T, narrow @ gram.double() @ narrow.T]
    mixed = fused.up.double().T @ own.up.double()
    inners = (fused.inner, mixed, own.inner)
    first, second, third = ((inner * square).sum().item() for inner, square in zip(inners, squares, strict=True))
    return first, second, third


def condition_number(matrix: torch.Tensor, inverse: torch.Tensor) -> float:
    """|M|_1 |M^-1|_1, by which relative errors of M can grow in the solution.

    Args:
        matrix: Shape (in_features, in_features).
        inverse: Its inverse, of the same shape.
    """
    return float(torch.linalg.matrix_norm(matrix, ord=1) * torch.linalg.matrix_norm(inverse, ord=1))


def overlaps(updates: Sequence[Factors], met: torch.Tensor) -> torch.Tensor:
    """How much concepts ask a layer for something at the same place of its input space; 0 to 1.

    With R_i = dW_i G_i, what the objective asks of the layer for concept i, the overlap of two row spaces, weighted by
    how much is asked there, is |R_i R_j^T|_F / sqrt(|R_i R_i^T|_F |R_j R_j^T|_F).

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        met: See `target_rows`, (sum_i r_i, in_features).

    Returns:
        Shape (concepts, concepts), symmetric.
    """
    ranks = [len(update.down) for update in updates]
    rows = [
        torch.linalg.qr(update.up.double()).R @ block for update, block in zip(updates, met.split(ranks), strict=True)
    ]
    owner = torch.repeat_interleave(torch.arange(len(updates)), torch.tensor([len(one) for one in rows]))
    member = torch.nn.functional.one_hot(owner, len(updates)).to(met)  # (rows, concepts), on met's device
    products = torch.cat(rows) @ torch.cat(rows).T
    norms = (member.T @ products.square() @ member).sqrt()
    own = norms.diagonal()
    scale = (own[:, None] * own).sqrt()
    return torch.where(scale > 0, norms / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


def _beside(updates: Sequence[Factors]) -> torch.Tensor:
    return torch.cat([update.up.double() for update in updates], dim=1)
