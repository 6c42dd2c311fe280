"""Merges that know only the updates, not what the layers see: the baselines that gradient fusion is compared with.

TIES (arXiv:2306.01708) and DARE (arXiv:2311.03099) are PEFT's own functions, applied to the dense updates: applied to
the factors, as PEFT's `add_weighted_adapter` does, they merge something else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.utils.merge_utils import prune, ties

from diffusers_mixofshow.fusion.solvers import Factors, recompressed, weighted_average


TIES_DENSITY = 0.2
"""Share of each update's values that TIES keeps; its paper's setting."""

DARE_DENSITY = 0.5
"""Share of each update's values that DARE keeps, scaled up by its inverse."""


def summed(updates: Sequence[Factors]) -> Factors:
    """All updates at full strength: sum_i dW_i.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
    """
    return weighted_average(updates, [1.0] * len(updates))


def ties_merged(updates: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """Trim, elect sign and merge; what is left of the agreeing updates is averaged by share.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        shares: One per concept, summing to 1.
    """
    weights = len(shares) * torch.tensor(shares, dtype=torch.float64)  # ties() divides by how many agree
    return _factorise(ties([update.delta.double() for update in updates], weights, density=TIES_DENSITY))


def dare_merged(updates: Sequence[Factors], shares: Sequence[float], *, seed: int) -> Factors:
    """Drop values at random and rescale the others, then average by share.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        shares: One per concept, summing to 1.
        seed: Of what is dropped; the global random state stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Drawn on the CPU, so that a device does not change what is dropped.
        pruned = [prune(update.to("cpu").delta.double(), DARE_DENSITY, method="random") for update in updates]
    # Scaled up here, as PEFT 0.18 forgets to.
    return _factorise(sum(share * kept / DARE_DENSITY for share, kept in zip(shares, pruned, strict=True)))


def svd_merged(updates: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """The weighted average, cut down to the largest rank among the updates; what PEFT calls ``svd``.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        shares: One per concept, summing to 1.
    """
    largest = max(len(update.down) for update in updates)
    return recompressed(weighted_average(updates, shares), largest)[0]


def _factorise(delta: torch.Tensor) -> Factors:
    """A dense update, shape (out_features, in_features), as factors of its own rank."""
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    kept = max(1, int((values > values.max() * 1e-10).sum()))
    root = values[:kept].sqrt()
    return Factors(down=root[:, None] * right[:kept], up=left[:, :kept] * root)
