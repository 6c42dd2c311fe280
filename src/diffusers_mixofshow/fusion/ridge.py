"""Choose the ridge of one layer by the error on held-out inputs. Notation as in `solvers`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusers_mixofshow.fusion.gram import Gram
from diffusers_mixofshow.fusion.solvers import Factors


CANDIDATES = tuple(10 ** (exponent / 4) for exponent in range(-24, 3))
"""From 1e-6 to about 3, four to a decade, as fractions of the mean diagonal of the Gram matrix."""


def choose_ridge(
    updates: Sequence[Factors],
    targets: torch.Tensor,
    held_out_targets: torch.Tensor,
    held_out: Gram,
    fitted: Gram,
) -> tuple[float, float]:
    """Pick the ridge whose closed form, fitted to some inputs, reproduces the outputs of held-out inputs best.

    The solution for a ridge is D = U R with U = [B_1 .. B_n] and R = M (sum_i G_i + lambda I)^-1. With H_i
    the Gram matrices of the held-out inputs, H = sum_i H_i and S = U T, its error on them is
    tr(D H D^T) - 2 tr(D S^T) + sum_i tr(dW_i H_i dW_i^T). M and T are the right-hand sides of the
    fitted and the held-out inputs.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        targets: M, of the fitted inputs, (sum_i r_i, in_features), see `target_rows`.
        held_out_targets: T, of the held-out inputs.
        held_out: H, (in_features, in_features).
        fitted: sum_i G_i plus the prior, if any, (in_features, in_features).

    Returns:
        The ridge, one of `CANDIDATES`, and its squared error on the held-out inputs relative to that of the base.
    """
    up = torch.cat([update.up.double() for update in updates], dim=1)
    inner, errors = up.T @ up, {}
    for ridge, rows in zip(CANDIDATES, fitted.solve(targets, CANDIDATES), strict=True):
        errors[ridge] = float((inner * (held_out.multiply(rows) @ rows.T - 2 * rows @ held_out_targets.T)).sum())
    best = min(errors, key=errors.__getitem__)
    blocks = held_out_targets.split([len(update.down) for update in updates])
    pairs = zip(updates, blocks, strict=True)
    base = sum(float((one.inner * (block @ one.down.double().T)).sum()) for one, block in pairs)
    return best, (errors[best] + base) / base if base > 0 else 0.0
