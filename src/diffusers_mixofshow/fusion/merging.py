"""Merges that use the updates alone and no layer inputs: the baselines that gradient fusion is compared with.

TIES (arXiv:2306.01708) and DARE (arXiv:2311.03099) are PEFT's own functions, applied to the dense updates.
PEFT's `add_weighted_adapter` applies them to the factors A and B separately, which gives another result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusers_mixofshow.fusion.solvers import Factors, truncate_rank, weighted_average


TIES_DENSITY = 0.2
"""Share of each update's values that TIES keeps; its paper's setting."""

DARE_DENSITY = 0.5
"""Share of each update's values that DARE keeps, scaled up by its inverse."""


def merge_ties(updates: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """TIES: trim each update, elect a sign for each value, and average the values of that sign, weighted by share.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        shares: One per concept, summing to 1.
    """
    from peft.utils.merge_utils import ties

    device = updates[0].down.device
    weights = len(shares) * torch.tensor(
        shares, dtype=torch.float64, device=device
    )  # ties() divides by how many agree
    return _factorise(ties([update.delta.double() for update in updates], weights, density=TIES_DENSITY))


def merge_dare(updates: Sequence[Factors], shares: Sequence[float], *, seed: int) -> Factors:
    """DARE: drop values at random and rescale the others, then take the average weighted by share.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        shares: One per concept, summing to 1.
        seed: Chooses the dropped values; the global random state is left unchanged.
    """
    from peft.utils.merge_utils import prune

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Drawn on the CPU, so that every device drops the same values.
        pruned = [prune(update.to("cpu").delta.double(), DARE_DENSITY, method="random") for update in updates]
    # PEFT 0.18's prune() does not rescale, so it is done here.
    return _factorise(sum(share * kept / DARE_DENSITY for share, kept in zip(shares, pruned, strict=True)))


def merge_svd(updates: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """The weighted average, truncated to the largest rank among the updates; PEFT calls it ``svd``.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        shares: One per concept, summing to 1.
    """
    largest = max(len(update.down) for update in updates)
    return truncate_rank(weighted_average(updates, shares), largest)[0]


def _factorise(delta: torch.Tensor) -> Factors:
    """Factorise a dense update, shape (out_features, in_features), at its numerical rank."""
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    kept = max(1, int((values > values.max() * 1e-10).sum()))
    root = values[:kept].sqrt()
    return Factors(down=root[:, None] * right[:kept], up=left[:, :kept] * root)
