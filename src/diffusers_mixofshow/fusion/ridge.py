"""The ridge of one layer, chosen by inputs that were held out. Notation as in `solvers`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusers_mixofshow.fusion.solvers import Factors


CANDIDATES = tuple(10 ** (exponent / 4) for exponent in range(-24, 3))
"""From 1e-6 to about 3, four to a decade, as fractions of the mean diagonal of the Gram matrix."""


def chosen_ridge(
    updates: Sequence[Factors],
    fitted: Sequence[torch.Tensor],
    held_out: Sequence[torch.Tensor],
    spectrum: tuple[torch.Tensor, torch.Tensor],
    candidates: Sequence[float] = CANDIDATES,
) -> tuple[float, float]:
    """Pick the ridge whose closed form, fitted to one set of inputs, reproduces the outputs of another set best.

    With sum_i G_i = V diag(s) V^T, the solution for every ridge is D = U M V diag(1 / (s + lambda)) V^T, where
    U = [B_1 .. B_n] and M = stack_i(s_i A_i G_i). Its error on the inputs held out, with H_i their Gram matrices, is
    tr(D H D^T) - 2 tr(D S^T) + const with H = sum_i H_i and S = U stack_i(s_i A_i H_i): one decomposition serves all.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        fitted: G_i, one per concept, (in_features, in_features), weighted by the concept's share.
        held_out: H_i, in the same way.
        spectrum: Eigenvalues s, (in_features,), and eigenvectors V as columns of the matrix that is inverted,
            sum_i G_i with whatever prior was added.
        candidates: Ridges to choose from, relative to the mean of s.

    Returns:
        The ridge, and its error on the inputs held out relative to leaving the base as it is.
    """
    values, vectors = spectrum
    up = torch.cat([update.up.double() for update in updates], dim=1)
    inner = up.T @ up  # (sum r_i, sum r_i)
    pairs = list(zip(updates, fitted, held_out, strict=True))
    met = torch.cat([update.down.double() @ gram for update, gram, _ in pairs]) @ vectors
    asked = torch.cat([update.down.double() @ gram for update, _, gram in pairs]) @ vectors
    seen = vectors.T @ torch.stack(list(held_out)).sum(dim=0) @ vectors
    base = sum(float(((u.up.T @ u.up).double() * (u.down @ gram @ u.down.T)).sum()) for u, _, gram in pairs)
    errors = []
    for candidate in candidates:
        rows = met / (values + candidate * values.mean())  # D = U rows V^T
        errors.append(float((inner * (rows @ seen @ rows.T - 2 * rows @ asked.T)).sum()))
    best = min(range(len(candidates)), key=errors.__getitem__)
    return candidates[best], (errors[best] + base) / base if base > 0 else 0.0
