"""The closed form against dense least squares, the average against equation 2, and what both leave alone."""

import pytest
import torch

from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.fusion.solvers import (
    Factors,
    at_most_full_rank,
    closed_form,
    factorise,
    relative_residual,
    weighted_average,
)


IN, OUT, RANK = 12, 20, 2


def _concepts(count: int, tokens: int = 200) -> tuple[list[Factors], list[torch.Tensor]]:
    """Random updates, and features as columns of shape (in, tokens)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    updates = [Factors(down=normal(RANK, IN), up=normal(OUT, RANK)) for _ in range(count)]
    return updates, [normal(IN, IN) @ normal(IN, tokens) for _ in range(count)]


def _grams(features: list[torch.Tensor]) -> list[torch.Tensor]:
    return [one @ one.T for one in features]


def test_closed_form_is_dense_least_squares() -> None:
    updates, features = _concepts(3)
    grams = _grams(features)
    fused = closed_form(updates, grams, factorise(grams, ridge=0))
    targets = torch.cat([update.delta @ x for update, x in zip(updates, features, strict=True)], dim=1)
    dense = torch.linalg.lstsq(torch.cat(features, dim=1).T, targets.T).solution.T
    torch.testing.assert_close(fused.delta, dense)
    assert fused.down.shape == (3 * RANK, IN)


def test_closed_form_with_ridge_has_no_gradient_left() -> None:
    updates, features = _concepts(3)
    grams = _grams(features)
    ridge = 0.05
    delta = closed_form(updates, grams, factorise(grams, ridge)).delta.requires_grad_()
    damping = ridge * sum(grams).diagonal().mean()
    objective = damping * delta.square().sum() + sum(
        ((update.delta - delta) @ x).square().sum() for update, x in zip(updates, features, strict=True)
    )
    (gradient,) = torch.autograd.grad(objective, delta)
    scale = 2 * sum(update.delta @ gram for update, gram in zip(updates, grams, strict=True)).norm()
    assert gradient.norm() / scale < 1e-12


def test_one_concept_alone_comes_back() -> None:
    updates, features = _concepts(1)
    grams = _grams(features)
    fused = closed_form(updates, grams, factorise(grams, ridge=1e-12))
    torch.testing.assert_close(fused.delta, updates[0].delta, rtol=1e-6, atol=1e-6)


def test_directions_without_features_keep_the_base() -> None:
    updates, features = _concepts(2)
    unseen = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.float64)).Q[:, :4]
    features = [x - unseen @ (unseen.T @ x) for x in features]
    grams = _grams(features)
    for ridge in (0, 1e-6):
        fused = closed_form(updates, grams, factorise(grams, ridge))
        assert (fused.delta @ unseen).abs().max() < 1e-6
    assert all(relative_residual(fused, own, gram) < 1.5 for own, gram in zip(updates, grams, strict=True))


def test_concepts_in_separate_subspaces_are_all_kept() -> None:
    updates, features = _concepts(2)
    basis = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.float64)).Q
    parts = [basis[:, : IN // 2], basis[:, IN // 2 :]]
    grams = _grams([part @ part.T @ x for part, x in zip(parts, features, strict=True)])
    fused = closed_form(updates, grams, factorise(grams, ridge=1e-10))
    average = weighted_average(updates, [0.5, 0.5])
    for own, gram in zip(updates, grams, strict=True):
        assert relative_residual(fused, own, gram) < 1e-4
        assert relative_residual(average, own, gram) > 0.3


def test_order_does_not_matter() -> None:
    updates, features = _concepts(3)
    grams = _grams(features)
    forward = closed_form(updates, grams, factorise(grams, 1e-2)).delta
    backward = closed_form(updates[::-1], grams[::-1], factorise(grams[::-1], 1e-2)).delta
    torch.testing.assert_close(forward, backward)


def test_average_is_equation_2() -> None:
    updates, _ = _concepts(3)
    weights = [0.5, 0.3, 0.2]
    expected = sum(weight * update.delta for weight, update in zip(weights, updates, strict=True))
    torch.testing.assert_close(weighted_average(updates, weights).delta, expected)


@pytest.mark.parametrize("count", [5, 9])
def test_recompression_loses_nothing(count: int) -> None:
    updates, _ = _concepts(count)
    summed = weighted_average(updates, [1.0] * count)
    compact = at_most_full_rank(summed)
    assert len(compact.down) == min(count * RANK, IN)
    torch.testing.assert_close(compact.delta, summed.delta)


def test_residual_is_the_relative_error_of_the_outputs() -> None:
    updates, features = _concepts(2)
    x = features[0]
    expected = ((updates[1].delta - updates[0].delta) @ x).norm() / (updates[0].delta @ x).norm()
    assert relative_residual(updates[1], updates[0], x @ x.T) == pytest.approx(expected.item())
    assert relative_residual(updates[0], updates[0], x @ x.T) == pytest.approx(0, abs=1e-6)


def test_residual_where_a_concept_changes_nothing() -> None:
    updates, features = _concepts(1)
    nothing = Factors(down=torch.zeros(0, IN).double(), up=torch.zeros(OUT, 0).double())
    gram = features[0] @ features[0].T
    assert relative_residual(nothing, nothing, gram) == 0
    assert relative_residual(updates[0], nothing, gram) == float("inf")


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FusionError, match="NaN"):
        factorise([torch.full((IN, IN), float("nan"))], ridge=1e-2)
