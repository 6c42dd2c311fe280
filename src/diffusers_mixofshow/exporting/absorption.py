"""Fit a low-rank update of a layer that replaces the effect of its own embeddings when all layers share embeddings.

A cross-attention layer multiplies states of the text by a weight W, for keys or for values. With the layer's own
embeddings these states are Y, with shared ones X; both have one row per position in each prompt. The update D that
compensates for the difference minimises |X D^T - (Y - X) W^T|^2 + |N D^T|^2 + lambda |D|^2, where N are states of
prompts without the concept, whose outputs should not change. With G = X^T X + N^T N + lambda I the solution is
D = W (Y - X)^T X G^-1. The best update of rank r keeps the r largest singular values of D G^(1/2). All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


_RIDGE = 1e-3
"""lambda as a fraction of the mean diagonal of the other terms."""


@dataclass(frozen=True)
class Metric:
    """The metric G of the least-squares problem, equal for all layers.

    Args:
        inverse_root: G^(-1/2), shape (dim, dim).
        states: X, shape (places, dim).
    """

    inverse_root: torch.Tensor
    states: torch.Tensor

    @classmethod
    def of(cls, states: torch.Tensor, neutral: torch.Tensor) -> Metric:
        """Make G with equal total weight for X and N, however many rows each has.

        Args:
            states: X, shape (places, dim).
            neutral: N, shape (other places, dim).
        """
        states, neutral = states.double(), neutral.double()
        gram = states.T @ states / len(states) + neutral.T @ neutral / len(neutral)
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        values, vectors = torch.linalg.eigh(len(states) * gram)
        return cls((vectors * values.rsqrt()) @ vectors.T, states)


@dataclass(frozen=True, kw_only=True)
class Absorbed:
    """The update ``up @ down`` of one weight.

    Args:
        down: Shape (rank, dim).
        up: Shape (out, rank); each column has the norm of the matching row of `down`.
        kept: Share of the effect of the layer's own embeddings that the update has:
            1 - |X D^T - (Y - X) W^T|^2 / |(Y - X) W^T|^2; 1 if they have no effect.
    """

    down: torch.Tensor
    up: torch.Tensor
    kept: float


def absorb(weight: torch.Tensor, own: torch.Tensor, metric: Metric, rank: int) -> Absorbed:
    """Find the update of one weight.

    Args:
        weight: W, shape (out, dim).
        own: Y, the states with the layer's own embeddings, shape (places, dim).
        metric: Metric of the states X with shared embeddings.
        rank: Rank of the update; less if the weight's sides are smaller.
    """
    wanted = (own.double() - metric.states) @ weight.double().T
    turned = wanted.T @ (metric.states @ metric.inverse_root)  # D G^(1/2)
    left, values, right = torch.linalg.svd(turned, full_matrices=False)
    down, up = right[:rank] @ metric.inverse_root, left[:, :rank] * values[:rank]
    missing = (wanted - metric.states @ down.T @ up.T).square().sum()
    total = wanted.square().sum()
    longer = down.norm(dim=1).sqrt() / up.norm(dim=0).sqrt().clamp_min(torch.finfo(up.dtype).tiny)
    return Absorbed(down=down / longer[:, None], up=up * longer, kept=float(1 - missing / total) if total > 0 else 1.0)
