"""The ridge of one layer, chosen by inputs that were held out. Notation as in `solvers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from diffusers_mixofshow.fusion.compression import GramFactor
from diffusers_mixofshow.fusion.solvers import FactorInverter, Factors


CANDIDATES = tuple(10 ** (exponent / 4) for exponent in range(-24, 3))
"""From 1e-6 to about 3, four to a decade, as fractions of the mean diagonal of the Gram matrix."""


def chosen_ridge(
    updates: Sequence[Factors],
    met: torch.Tensor,
    asked: torch.Tensor,
    held_out: torch.Tensor,
    spectrum: tuple[torch.Tensor, torch.Tensor],
    candidates: Sequence[float] = CANDIDATES,
) -> tuple[float, float]:
    """Pick the ridge whose closed form, fitted to one set of inputs, reproduces the outputs of another set best.

    With sum_i G_i = V diag(s) V^T, the solution for every ridge is D = U M V diag(1 / (s + lambda)) V^T, where
    U = [B_1 .. B_n] and M = stack_i(s_i A_i G_i). Its error on the inputs held out, with H_i their Gram matrices, is
    tr(D H D^T) - 2 tr(D S^T) + const with H = sum_i H_i and S = U stack_i(s_i A_i H_i): one decomposition serves all.

    Args:
        updates: One update per concept; factors (r_i, in_features) and (out_features, r_i).
        met: M of the inputs fitted, (sum_i r_i, in_features), see `target_rows`.
        asked: The same of the inputs held out.
        held_out: H, (in_features, in_features).
        spectrum: Eigenvalues s, (in_features,), and eigenvectors V as columns of the matrix that is inverted,
            sum_i G_i with whatever prior was added.
        candidates: Ridges to choose from, relative to the mean of s.

    Returns:
        The ridge, and its error on the inputs held out relative to leaving the base as it is.
    """
    values, vectors = spectrum
    turned, turned_asked = met @ vectors, asked @ vectors
    seen = vectors.T @ held_out @ vectors
    solved = {each: turned / (values + each * values.mean()) for each in candidates}  # D = U rows V^T
    products = {each: rows @ seen @ rows.T - 2 * rows @ turned_asked.T for each, rows in solved.items()}
    return _best(updates, asked, products)


def chosen_ridge_of_factors(
    updates: Sequence[Factors],
    met: torch.Tensor,
    asked: torch.Tensor,
    held_out: GramFactor,
    fitted: GramFactor,
    candidates: Sequence[float] = CANDIDATES,
) -> tuple[float, float]:
    """The same of a wide layer, whose sums are factors.

    Args:
        updates: As in `chosen_ridge`.
        met: As there.
        asked: As there.
        held_out: H.
        fitted: sum_i G_i with whatever prior was added.
        candidates: Ridges to choose from, relative to the mean diagonal.

    Returns:
        As there.
    """
    inverter, products = FactorInverter(fitted, met.device), {}
    for each in candidates:
        rows = inverter.inverse(each).applied(met)
        products[each] = held_out.applied(rows) @ rows.T - 2 * rows @ asked.T
    return _best(updates, asked, products)


def _best(
    updates: Sequence[Factors], asked: torch.Tensor, products: Mapping[float, torch.Tensor]
) -> tuple[float, float]:
    """The ridge of the smallest error, given rows H rows^T - 2 rows S^T of each, (sum_i r_i, sum_i r_i)."""
    up = torch.cat([update.up.double() for update in updates], dim=1)
    inner = up.T @ up
    errors = {each: float((inner * product).sum()) for each, product in products.items()}
    best = min(errors, key=errors.__getitem__)
    base = _own_energy(updates, asked)
    return best, (errors[best] + base) / base if base > 0 else 0.0


def _own_energy(updates: Sequence[Factors], asked: torch.Tensor) -> float:
    """sum_i tr(dW_i H_i dW_i^T), from the rows s_i A_i H_i."""
    blocks = asked.split([len(update.down) for update in updates])
    pairs = zip(updates, blocks, strict=True)
    return sum(float(((u.up.T @ u.up).double() * (block @ u.down.double().T)).sum()) for u, block in pairs)
