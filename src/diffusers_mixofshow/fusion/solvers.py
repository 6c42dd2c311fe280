"""Gradient fusion as linear algebra: pure functions of Gram matrices and low-rank factors, float64 inside.

Notation, as in arXiv:2305.18292 section 3.3.2: concept i changes a layer's weight W0 by dW_i = B_i A_i; X_i are the
layer's inputs for its prompts (features as columns). Here up_i = B_i, down_i = s_i A_i including the LoRA's scaling
s_i, and gram_i = X_i X_i^T. An update D = W - W0 is always a pair of factors, D = up @ down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.fusion.gram import DenseGram, Gram, Inverse, multiply_by_transpose


LBFGS_TOLERANCE = 1e-16
"""Change of the objective or of the weights, and size of the gradient, at which the paper's solver stops early (the
authors' code). torch's own defaults, 1e-9 and 1e-7, end it long before its steps are done."""


LBFGS_HISTORY = 25
"""Number of past steps from which the paper's solver estimates the curvature."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A low-rank update ``up @ down`` of one layer's weight, all scaling included.

    Args:
        down: The paper's s A, shape (rank, in_features); rank 0 changes nothing.
        up: The paper's B, shape (out_features, rank).
        image: `Gram.image` of `down`, by the sum of the concepts' matrices, where it is known; (rank, kept).
    """

    down: torch.Tensor
    up: torch.Tensor
    image: torch.Tensor | None = None

    @classmethod
    def of(cls, update: LowRank) -> Factors:
        """The factors of a LoRA's update of one layer: `down` in float64, `up` as it is."""
        return cls(down=update.scaling * update.down.double(), up=update.up)

    def to(self, device: str | torch.device) -> Factors:
        """The same update on a device."""
        return Factors(down=self.down.to(device), up=self.up.to(device))

    @property
    def delta(self) -> torch.Tensor:
        """The dense update, shape (out_features, in_features)."""
        return self.up.to(self.down) @ self.down

    @property
    def inner(self) -> torch.Tensor:
        """Inner products of the columns of `up`, shape (rank, rank), float64."""
        return multiply_by_transpose(self.up.double().T)


def target_rows(updates: Sequence[Factors], grams: Sequence[Gram]) -> torch.Tensor:
    """Right-hand side of the normal equations without B: stack_i(s_i A_i G_i), (sum_i r_i, in_features), float64.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        grams: One Gram matrix per concept, (in_features, in_features), in the same order.
    """
    return torch.cat([gram.multiply(update.down.double()) for update, gram in zip(updates, grams, strict=True)])


def closed_form(
    updates: Sequence[Factors], targets: torch.Tensor, inverse: Inverse, image: torch.Tensor | None = None
) -> Factors:
    """The update that reproduces every concept's outputs on its own inputs, exactly as a LoRA of rank sum_i r_i.

    Minimises sum_i |dW_i X_i - D X_i|^2 + lambda |D|^2, the objective of section 3.3.2 plus a ridge. Its normal
    equation D (sum_i G_i + lambda I) = sum_i B_i s_i A_i G_i leaves the B_i as they are:
    D = [B_1 .. B_n] . stack_i(s_i A_i G_i (sum_j G_j + lambda I)^-1).

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        targets: See `target_rows`, (sum_i r_i, in_features).
        inverse: (sum_j G_j + lambda I)^-1.
        image: `Gram.image` of the targets by sum_j G_j, where it is known.
    """
    down, image = inverse.apply(targets, inverse.gram.image(targets) if image is None else image)
    return Factors(down=down, up=_concatenate_ups(updates), image=image)


def closed_form_in_span(updates: Sequence[Factors], targets: torch.Tensor, gram: Gram, ridge: float) -> Factors:
    """The closed form restricted to the row space of the concepts' own updates: SSR-Merge (arXiv:2606.10617).

    With A = stack_i(s_i A_i) and B = [B_1 .. B_n], D = B R A. R minimises sum_i |dW_i X_i - D X_i|^2 + lambda |B R|^2,
    so that R (A G A^T + lambda I) = stack_i(s_i A_i G_i) A^T with G = sum_i G_i. The paper records
    one prompt at one denoising step and uses an absolute ridge of 1e-4; here it gets the same statistics and the same
    relative ridge as `closed_form`.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        targets: See `target_rows`, (sum_i r_i, in_features).
        gram: G, (in_features, in_features).
        ridge: lambda as a fraction of the mean diagonal of A G A^T.

    Raises:
        FusionError: If A G A^T + lambda I is numerically singular in spite of a ridge.
    """
    downs = torch.cat([update.down.double() for update in updates])
    inner = DenseGram(gram.multiply(downs) @ downs.T).inverse(ridge)  # A G A^T
    return Factors(down=inner.multiply(targets @ downs.T) @ downs, up=_concatenate_ups(updates))


def weighted_average(updates: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Equation 2, W = W0 + sum_i w_i dW_i with sum_i w_i = 1, exactly as a LoRA of rank sum_i r_i.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        weights: One w_i per concept, in the same order.
    """
    downs = [weight * update.down.double() for update, weight in zip(updates, weights, strict=True)]
    return Factors(down=torch.cat(downs), up=_concatenate_ups(updates))


def lbfgs(updates: Sequence[Factors], targets: torch.Tensor, gram: Gram, *, steps: int) -> Factors:
    """The paper's solver (section 6.1): LBFGS with strong Wolfe line search from the base weights, stopped early.

    The objective needs no features: |dW_i X_i - D X_i|^2 summed over i is tr(D G D^T) - 2 tr(D R^T) + const, with
    G = sum_i G_i and R = sum_i dW_i G_i. Every gradient 2 (D G - R) lies in the column space of [B_1 .. B_n] if D
    does, and D starts at 0. So D = Q M, with Q an orthonormal basis of that space, and only M is optimised: the same
    iterates with far fewer variables.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        targets: See `target_rows`, (sum_i r_i, in_features).
        gram: G, (in_features, in_features).
        steps: LBFGS iterations at most; the paper takes 500 for text layers and text keys and values, 50 for the rest.
    """
    basis, mixing = torch.linalg.qr(_concatenate_ups(updates))  # (out, rank), (rank, sum r_i)
    target = mixing @ targets  # (rank, in)
    # The authors' loss is a mean over output features; the first step of LBFGS depends on this scale.
    per_feature = 1 / max(1, basis.shape[0])
    moving = torch.zeros_like(target, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [moving],
        lr=1,
        max_iter=steps,
        history_size=LBFGS_HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=LBFGS_TOLERANCE,
        tolerance_change=LBFGS_TOLERANCE,
    )

    def closure() -> torch.Tensor:
        image = gram.multiply(moving.detach())
        moving.grad = 2 * per_feature * (image - target)
        return per_feature * (moving.detach() * (image - 2 * target)).sum()

    if target.numel():
        optimiser.step(closure)
    return Factors(down=moving.detach(), up=basis)


def truncate_rank(update: Factors, max_rank: int) -> tuple[Factors, float]:
    """Best approximation of rank `max_rank` or less, by thin QR of both factors and an SVD of the small product.

    Args:
        update: Factors (rank, in_features) and (out_features, rank).
        max_rank: At least 1.

    Returns:
        The factors, each with the square roots of the singular values, and the share of |D|^2 that is kept.
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


def limit_rank(update: Factors, max_rank: int | None) -> tuple[Factors, float]:
    """See `truncate_rank`; factors of no more rows than `max_rank` and the layer's full rank are left as they are."""
    limit = min(update.up.shape[0], update.down.shape[1], *([] if max_rank is None else [max_rank]))
    return (update, 1.0) if len(update.down) <= limit else truncate_rank(update, limit)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parts b_k a_k of rank 1 of several updates of one layer, as far as the outputs' sizes depend on them.

    Args:
        image: `Gram.image` of the rows a_k, by the matrix that products are taken with; (parts, kept), float64.
        outer: Inner products of the a_k, shape (parts, parts).
        inner: Inner products of the b_k, shape (parts, parts).
        owner: Number of the update that each part belongs to, shape (parts,).
    """

    image: torch.Tensor
    outer: torch.Tensor
    inner: torch.Tensor
    owner: torch.Tensor

    @classmethod
    def of(cls, updates: Sequence[Factors]) -> Parts:
        """The parts of all updates, in their order; updates without an image count as those of a dense matrix."""
        up, last = _concatenate_ups(updates[:-1]), updates[-1].up.double()
        if torch.equal(up, last):  # the closed form leaves all B as they are
            inner = multiply_by_transpose(up.T).repeat(2, 2)
        else:
            inner = multiply_by_transpose(torch.cat([up, last], dim=1).T)
        downs = [update.down.double() for update in updates]
        images = [down if update.image is None else update.image for update, down in zip(updates, downs, strict=True)]
        return cls(
            image=torch.cat(images),
            outer=multiply_by_transpose(torch.cat(downs)),
            inner=inner,
            owner=_number_rows([update.down for update in updates]),
        )


def relative_residual(fused: Factors, own: Factors, gram: Gram) -> float:
    """Relative error that fusion makes in one concept's outputs of one layer.

    sqrt( tr((D - dW_i) G_i (D - dW_i)^T) / tr(dW_i G_i dW_i^T) ) = |D X_i - dW_i X_i|_F / |dW_i X_i|_F, the root of
    the objective's i-th term relative to its value at W0; 0 is perfect, 1 no better than W0.

    Args:
        fused: The fused update D.
        own: The concept's own update dW_i.
        gram: The concept's Gram matrix G_i, (in_features, in_features).

    Returns:
        The ratio. If the concept does not change the outputs: 0 if fusion does not either, otherwise infinity.
    """
    parts = Parts.of([replace(one, image=gram.image(one.down.double())) for one in (fused, own)])
    return relative_residuals(parts, parts.owner == 0, parts.owner == 1, gram)[0]


def relative_residuals(parts: Parts, merged: torch.Tensor, own: torch.Tensor, gram: Gram) -> list[float]:
    """The `relative_residual` of several merged updates with one concept's own.

    All are sums of weighted parts, and |sum_k c_k b_k a_k X|_F^2 = c^T Q c with Q_kl = (b_k^T b_l) (a_k G a_l^T).

    Args:
        parts: Parts of the merged and the own updates.
        merged: Weight of each part in each merged update, (merged updates, parts) or (parts,).
        own: Weight of each part in the concept's own update, (parts,).
        gram: The concept's Gram matrix, (in_features, in_features).
    """
    products = parts.inner * (gram.inner_products(parts.image) + gram.tail * parts.outer)  # Q
    weights = torch.vstack([own, merged]).to(products)
    weights[1:] -= weights[0]
    scale, *errors = ((weights @ products) * weights).sum(dim=1).clamp_min(0).sqrt().tolist()
    if scale == 0:
        return [0.0 if error == 0 else float("inf") for error in errors]
    return [error / scale for error in errors]


def overlaps(updates: Sequence[Factors], targets: torch.Tensor) -> torch.Tensor:
    """How much the concepts' right-hand sides share directions of a layer's input space, pair by pair; 0 to 1.

    With R_i = dW_i G_i, concept i's right-hand side of the normal equations, the overlap of two row spaces, weighted
    by the size of R there, is |R_i R_j^T|_F / sqrt(|R_i R_i^T|_F |R_j R_j^T|_F). With R_i = B_i T_i, such a norm's
    square is the sum over (B_i^T B_i M) * (M B_j^T B_j), M = T_i T_j^T.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        targets: See `target_rows`, (sum_i r_i, in_features).

    Returns:
        Shape (concepts, concepts), symmetric.
    """
    owner = _number_rows([one.down for one in updates])
    member = torch.nn.functional.one_hot(owner, len(updates)).to(targets)  # (rows, concepts)
    inner = torch.block_diag(*(one.inner for one in updates))
    products = multiply_by_transpose(targets)
    norms = (member.T @ ((inner @ products) * (products @ inner)) @ member).clamp_min(0).sqrt()
    own = norms.diagonal()
    scale = (own[:, None] * own).sqrt()
    return torch.where(scale > 0, norms / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


def _concatenate_ups(updates: Sequence[Factors]) -> torch.Tensor:
    return torch.cat([update.up for update in updates], dim=1).double()


def _number_rows(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Number of the block that each row of the stack of all blocks belongs to, (rows,)."""
    sizes = torch.tensor([len(block) for block in blocks], device=blocks[0].device)
    return torch.repeat_interleave(torch.arange(len(blocks), device=blocks[0].device), sizes)
