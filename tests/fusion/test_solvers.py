"""The closed form against dense least squares, the average against equation 2, and what both leave alone."""

import pytest
import torch

from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.fusion.compression import Spectrum
from diffusers_mixofshow.fusion.gram import DenseGram, Gram, GramFactor, multiply_by_transpose, sum_grams
from diffusers_mixofshow.fusion.merging import merge_dare, merge_svd, merge_ties
from diffusers_mixofshow.fusion.ridge import CANDIDATES, choose_ridge
from diffusers_mixofshow.fusion.solvers import (
    Factors,
    Parts,
    closed_form,
    closed_form_in_span,
    lbfgs,
    limit_rank,
    overlaps,
    relative_residual,
    relative_residuals,
    target_rows,
    truncate_rank,
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


def _grams(features: list[torch.Tensor]) -> list[DenseGram]:
    return [DenseGram(one @ one.T) for one in features]


def _sum(grams: list[Gram]) -> Gram:
    return sum_grams((gram, 1.0) for gram in grams)


def _fused(updates: list[Factors], grams: list[Gram], ridge: float) -> Factors:
    return closed_form(updates, target_rows(updates, grams), _sum(grams).inverse(ridge))


def test_closed_form_is_dense_least_squares() -> None:
    updates, features = _concepts(3)
    grams = _grams(features)
    fused = _fused(updates, grams, 0)
    targets = torch.cat([update.delta @ x for update, x in zip(updates, features, strict=True)], dim=1)
    dense = torch.linalg.lstsq(torch.cat(features, dim=1).T, targets.T).solution.T
    torch.testing.assert_close(fused.delta, dense)
    assert fused.down.shape == (3 * RANK, IN)


def test_closed_form_with_ridge_has_no_gradient_left() -> None:
    updates, features = _concepts(3)
    grams = _grams(features)
    ridge = 0.05
    delta = _fused(updates, grams, ridge).delta.requires_grad_()
    damping = ridge * _sum(grams).matrix().diagonal().mean()
    objective = damping * delta.square().sum() + sum(
        ((update.delta - delta) @ x).square().sum() for update, x in zip(updates, features, strict=True)
    )
    (gradient,) = torch.autograd.grad(objective, delta)
    scale = 2 * sum(update.delta @ gram.matrix() for update, gram in zip(updates, grams, strict=True)).norm()
    assert gradient.norm() / scale < 1e-12


def test_one_concept_alone_comes_back() -> None:
    updates, features = _concepts(1)
    grams = _grams(features)
    fused = _fused(updates, grams, 1e-12)
    torch.testing.assert_close(fused.delta, updates[0].delta, rtol=1e-6, atol=1e-6)


def test_directions_without_features_keep_the_base() -> None:
    updates, features = _concepts(2)
    unseen = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.float64)).Q[:, :4]
    features = [x - unseen @ (unseen.T @ x) for x in features]
    grams = _grams(features)
    for ridge in (0, 1e-6):
        fused = _fused(updates, grams, ridge)
        assert (fused.delta @ unseen).abs().max() < 1e-6
    assert all(relative_residual(fused, own, gram) < 1.5 for own, gram in zip(updates, grams, strict=True))


def test_concepts_in_separate_subspaces_are_all_kept() -> None:
    updates, features = _concepts(2)
    basis = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.float64)).Q
    parts = [basis[:, : IN // 2], basis[:, IN // 2 :]]
    grams = _grams([part @ part.T @ x for part, x in zip(parts, features, strict=True)])
    fused = _fused(updates, grams, 1e-10)
    average = weighted_average(updates, [0.5, 0.5])
    for own, gram in zip(updates, grams, strict=True):
        assert relative_residual(fused, own, gram) < 1e-4
        assert relative_residual(average, own, gram) > 0.3


def test_order_does_not_matter() -> None:
    updates, features = _concepts(3)
    grams = _grams(features)
    forward = _fused(updates, grams, 1e-2).delta
    backward = _fused(updates[::-1], grams[::-1], 1e-2).delta
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
    compact = limit_rank(summed, None)[0]
    assert len(compact.down) == min(count * RANK, IN)
    torch.testing.assert_close(compact.delta, summed.delta)


def test_residual_is_the_relative_error_of_the_outputs() -> None:
    updates, features = _concepts(2)
    x = features[0]
    expected = ((updates[1].delta - updates[0].delta) @ x).norm() / (updates[0].delta @ x).norm()
    assert relative_residual(updates[1], updates[0], DenseGram(x @ x.T)) == pytest.approx(expected.item())
    assert relative_residual(updates[0], updates[0], DenseGram(x @ x.T)) == pytest.approx(0, abs=1e-6)


def test_residuals_of_several_merges_at_once_are_those_of_each() -> None:
    updates, features = _concepts(3)
    grams, weights = _grams(features), [0.5, 0.3, 0.2]
    fused, average = _fused(updates, grams, 1e-2), weighted_average(updates, weights)
    parts = Parts.of([*updates, fused])
    assert parts.owner.tolist() == [0] * RANK + [1] * RANK + [2] * RANK + [3] * 3 * RANK
    merged = torch.stack([torch.tensor([*weights, 0.0], dtype=torch.float64)[parts.owner], parts.owner == 3])
    for place, (own, gram, x) in enumerate(zip(updates, grams, features, strict=True)):
        found = relative_residuals(parts, merged, parts.owner == place, gram)
        dense = [((one.delta - own.delta) @ x).norm() / (own.delta @ x).norm() for one in (average, fused)]
        assert found == pytest.approx([value.item() for value in dense], rel=1e-9)


def test_residual_where_a_concept_changes_nothing() -> None:
    updates, features = _concepts(1)
    nothing = Factors(down=torch.zeros(0, IN).double(), up=torch.zeros(OUT, 0).double())
    (gram,) = _grams(features)
    assert relative_residual(nothing, nothing, gram) == 0
    assert relative_residual(updates[0], nothing, gram) == float("inf")


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FusionError, match="NaN"):
        DenseGram(torch.full((IN, IN), float("nan")).double()).inverse(1e-2)
    with pytest.raises(FusionError, match="NaN"):
        GramFactor(rows=torch.full((2, IN), float("nan")), tail=1.0).inverse(1e-2)


def test_inputs_that_were_always_zero_change_nothing() -> None:
    """Nothing is known of them, so that what is asked of them, products with zeros, is zero and not NaN."""
    gram, nothing = DenseGram(torch.zeros(IN, IN).double()), torch.zeros(2, IN).double()
    assert gram.inverse(1e-3).multiply(nothing).eq(0).all()
    assert all(solved.eq(0).all() for solved in gram.solve(nothing, [1e-3, 1.0]))


def _objective(delta: torch.Tensor, updates: list[Factors], features: list[torch.Tensor]) -> float:
    pairs = zip(updates, features, strict=True)
    return sum(((update.delta - delta) @ x).square().sum().item() for update, x in pairs)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_lbfgs_on_statistics_is_lbfgs_on_features(steps: int) -> None:
    """The paper's solver on all of W, with the authors' tolerances: the same iterates.

    B lies along axes, as the first step is not turned.
    """
    updates, features = _concepts(3)
    places = torch.randperm(OUT, generator=torch.Generator().manual_seed(2)).split(RANK)
    updates = [
        Factors(down=one.down, up=torch.zeros(OUT, RANK).double().index_put((place, torch.arange(RANK)), sizes))
        for one, place, sizes in zip(
            updates, places, torch.tensor([[1.0, -2], [3, 0.5], [-1, 1]]).double(), strict=False
        )
    ]
    dense = torch.zeros(OUT, IN, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [dense],
        lr=1,
        max_iter=steps,
        history_size=25,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-16,
        tolerance_change=1e-16,
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        pairs = zip(updates, features, strict=True)
        loss = torch.stack([((one.delta - dense) @ x).square().sum() for one, x in pairs]).sum() / OUT
        loss.backward()
        return loss

    optimiser.step(closure)
    targets, total = target_rows(updates, _grams(features)), _sum(_grams(features))
    found = lbfgs(updates, targets, total, steps=steps).delta
    assert (found - dense.detach()).norm() < 1e-5 * dense.detach().norm()


def test_lbfgs_comes_to_the_least_squares_in_the_papers_500_steps() -> None:
    updates, features = _concepts(3)
    grams = _grams(features)
    floor = _objective(_fused(updates, grams, 0).delta, updates, features)
    few, many = (
        _objective(lbfgs(updates, target_rows(updates, grams), _sum(grams), steps=steps).delta, updates, features)
        for steps in (5, 500)
    )
    assert floor <= many <= floor * (1 + 1e-6) < few


def test_lbfgs_of_nothing_is_nothing() -> None:
    nothing = Factors(down=torch.zeros(0, IN).double(), up=torch.zeros(OUT, 0).double())
    assert not lbfgs([nothing], torch.zeros(0, IN).double(), _grams(_concepts(1)[1])[0], steps=5).delta.any()


def test_recompression_is_the_nearest_of_its_rank() -> None:
    updates, _ = _concepts(4)
    whole = weighted_average(updates, [1.0] * len(updates))
    small, energy = truncate_rank(whole, 3)
    values = torch.linalg.svdvals(whole.delta)
    assert small.down.shape == (3, IN)
    torch.testing.assert_close((whole.delta - small.delta).norm(), values[3:].norm())
    assert energy == pytest.approx((values[:3].square().sum() / values.square().sum()).item())


def test_merges_of_the_field_agree_with_their_definition() -> None:
    updates, _ = _concepts(3)
    shares = [0.5, 0.3, 0.2]
    deltas = [update.delta for update in updates]
    torch.testing.assert_close(weighted_average(updates, [1.0] * len(updates)).delta, sum(deltas))
    average = sum(share * delta for share, delta in zip(shares, deltas, strict=True))
    left, values, right = torch.linalg.svd(average)
    nearest = left[:, :RANK] * values[:RANK] @ right[:RANK]
    torch.testing.assert_close(merge_svd(updates, shares).delta, nearest)
    assert len(merge_svd(updates, shares).down) == RANK


def test_ties_is_trim_elect_sign_and_merge() -> None:
    """Of each update the largest fifth; in each place the sign of their sum; the weighted mean of those that agree."""
    updates, _ = _concepts(3)
    shares = [0.5, 0.3, 0.2]
    trimmed = [_largest(update.delta, 0.2) for update in updates]
    agree = (torch.stack(trimmed) * sum(trimmed)) > 0
    weighted = torch.stack([3 * share * delta for share, delta in zip(shares, trimmed, strict=True)])
    expected = (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
    torch.testing.assert_close(merge_ties(updates, shares).delta, expected)
    assert (agree.sum(dim=0) < (weighted != 0).sum(dim=0)).any()


def test_dare_drops_half_at_random_and_doubles_the_rest() -> None:
    updates, _ = _concepts(2)
    state = torch.get_rng_state()
    dropped = merge_dare(updates, [0.75, 0.25], seed=3).delta
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(dropped, merge_dare(updates, [0.75, 0.25], seed=3).delta)
    assert not torch.allclose(dropped, merge_dare(updates, [0.75, 0.25], seed=4).delta)
    one, other = (2 * share * update.delta for share, update in zip((0.75, 0.25), updates, strict=True))
    kinds = [(dropped - kind).abs() < 1e-9 for kind in (torch.zeros_like(one), one, other, one + other)]
    assert torch.stack(kinds).any(dim=0).all()
    assert all(0.1 < kind.float().mean() < 0.4 for kind in kinds)


def _largest(delta: torch.Tensor, share: float) -> torch.Tensor:
    bound = delta.abs().flatten().sort(descending=True).values[int(share * delta.numel()) - 1]
    return torch.where(delta.abs() >= bound, delta, 0)


def test_chosen_ridge_is_the_best_on_held_out_inputs() -> None:
    updates, features = _concepts(3, tokens=8)
    generator = torch.Generator().manual_seed(1)
    fresh = [x + 2 * torch.randn(x.shape, generator=generator).double() for x in features]
    fitted, held_out = _grams(features), _grams(fresh)
    targets, asked = target_rows(updates, fitted), target_rows(updates, held_out)
    ridge, error = choose_ridge(updates, targets, asked, _sum(held_out), _sum(fitted))

    def relative(candidate: float) -> float:
        delta = _fused(updates, fitted, candidate).delta
        base = sum((update.delta @ x).square().sum().item() for update, x in zip(updates, fresh, strict=True))
        return _objective(delta, updates, fresh) / base

    assert error == pytest.approx(relative(ridge))
    assert error == pytest.approx(min(relative(candidate) for candidate in CANDIDATES))
    assert CANDIDATES[0] < ridge < CANDIDATES[-1]


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_the_closed_form_in_the_span_of_the_rows_is_the_dense_optimum_there(ridge: float) -> None:
    """Least squares for R in D = B R A, written out over all entries of R, with rows of sqrt(lambda) for its ridge."""
    updates, features = _concepts(2)
    grams = _grams(features)
    fused = closed_form_in_span(updates, target_rows(updates, grams), _sum(grams), ridge)
    ups = torch.cat([update.up for update in updates], dim=1)
    downs = torch.cat([update.down for update in updates])
    seen = downs @ torch.cat(features, dim=1)
    # B's columns carry no ridge of their own: the ridge is on B R, as the closed form's is on D.
    asked = torch.cat([update.delta @ x for update, x in zip(updates, features, strict=True)], dim=1)
    damping = ridge * (seen @ seen.T).diagonal().mean()
    padded = torch.cat([seen, damping.sqrt() * torch.eye(len(seen), dtype=torch.float64)], dim=1)
    asked = torch.cat([asked, torch.zeros(OUT, len(seen), dtype=torch.float64)], dim=1)
    mixed = torch.linalg.lstsq(padded.T, asked.T).solution.T  # B R, (out, ranks)
    torch.testing.assert_close(fused.delta, mixed @ downs)
    torch.testing.assert_close(fused.up, ups)
    free = _fused(updates, grams, ridge=0)
    if ridge == 0:
        assert _objective(free.delta, updates, features) < 0.9 * _objective(fused.delta, updates, features)


def test_overlaps_are_those_of_row_spaces() -> None:
    updates, features = _concepts(2)
    basis = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.float64)).Q
    apart = [basis[:, : IN // 2], basis[:, IN // 2 :]]
    grams = _grams([part @ part.T @ x for part, x in zip(apart, features, strict=True)])
    torch.testing.assert_close(
        overlaps(updates, target_rows(updates, grams)), torch.eye(2).double(), atol=1e-9, rtol=0
    )
    same = overlaps([updates[0]] * 2, target_rows([updates[0]] * 2, [grams[0]] * 2))
    torch.testing.assert_close(same, torch.ones(2, 2).double())


def test_overlaps_are_those_of_the_dense_right_hand_sides() -> None:
    updates, features = _concepts(3)
    grams = _grams(features)
    sides = [update.delta.double() @ gram.matrix() for update, gram in zip(updates, grams, strict=True)]
    norms = torch.tensor([[float((one @ other.T).norm()) for other in sides] for one in sides], dtype=torch.float64)
    own = norms.diagonal()
    torch.testing.assert_close(overlaps(updates, target_rows(updates, grams)), norms / (own[:, None] * own).sqrt())


def test_condition_number_of_a_diagonal() -> None:
    matrix = torch.diag(torch.tensor([4.0, 0.5])).double()
    assert DenseGram(matrix).inverse(0).condition == pytest.approx(8)
    assert DenseGram(matrix).inverse(1.0).condition == pytest.approx((4 + 2.25) / (0.5 + 2.25))


def test_condition_number_is_of_the_largest_column_sums() -> None:
    matrix = torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double()  # its inverse is [[1, -1], [-1, 2]]
    assert DenseGram(matrix).inverse(0).condition == pytest.approx(3 * 3)


def test_residual_of_a_low_rank_factor_is_that_of_its_matrix() -> None:
    updates, features = _concepts(2)
    factor = Spectrum.of(_grams(features)[0]).leading(4)
    expected = relative_residual(updates[1], updates[0], DenseGram(factor.matrix()))
    assert relative_residual(updates[1], updates[0], factor) == pytest.approx(expected)
    both = sum_grams([(factor, 1.0), (factor, 2.0)])
    torch.testing.assert_close(both.matrix(), 3 * factor.matrix())


def test_a_factor_stands_for_its_matrix() -> None:
    updates, features = _concepts(1)
    factor = Spectrum.of(_grams(features)[0]).leading(4)
    dense = DenseGram(factor.matrix())
    torch.testing.assert_close(target_rows(updates, [factor]), target_rows(updates, [dense]))
    total = torch.eye(IN).double()
    factor.add_to(total, 0.5)
    torch.testing.assert_close(total, torch.eye(IN).double() + 0.5 * factor.matrix())


def test_a_gram_matrix_that_is_singular_is_named_or_taken_at_minimum_norm() -> None:
    updates, features = _concepts(1, tokens=2)
    grams = _grams(features)
    with pytest.raises(FusionError, match=r"cannot be inverted with ridge=1e-40.*raise the ridge"):
        _sum(grams).inverse(1e-40)
    fused = _fused(updates, grams, 0)
    torch.testing.assert_close(fused.delta @ features[0], updates[0].delta.double() @ features[0])


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_svd_has_the_largest_rank_among_the_updates(rank: int) -> None:
    random = torch.Generator().manual_seed(5)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    updates = [Factors(down=values(one, IN), up=values(OUT, one)) for one in (rank, 0)]
    merged = merge_svd(updates, [0.5, 0.5])
    assert len(merged.down) == rank
    torch.testing.assert_close(merged.delta, 0.5 * updates[0].delta)


@pytest.mark.parametrize("rows", [0, 1, 128, 300])
def test_products_with_the_transpose_are_those_of_a_plain_product(rows: int) -> None:
    values = torch.randn(rows, 7, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    found = multiply_by_transpose(values)
    torch.testing.assert_close(found, values @ values.T)
    assert torch.equal(found.triu(128), found.tril(-128).T)


def test_weights_of_ties_are_where_the_updates_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device "meta" stands for a GPU, as one tensor on it cannot be multiplied by another on the CPU either."""
    places = set()

    def ties(deltas: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
        places.update(one.device.type for one in (*deltas, weights))
        return torch.ones(8, 8)

    monkeypatch.setattr("peft.utils.merge_utils.ties", ties)
    updates = [Factors(down=torch.ones(2, 8, device="meta"), up=torch.ones(8, 2, device="meta"))] * 2
    merge_ties(updates, [0.5, 0.5])
    assert places == {"meta"}
