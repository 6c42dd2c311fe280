"""The update that makes up for shared embeddings, against least squares done another way."""

from __future__ import annotations

import pytest
import torch

from diffusers_mixofshow.exporting.absorption import Metric, absorb


DIM, OUT = 12, 20


@pytest.fixture
def drawn() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared = values(40, DIM)
    return {"weight": values(OUT, DIM), "shared": shared, "own": shared + values(40, DIM), "neutral": values(30, DIM)}


def objective(update: torch.Tensor, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
    """|X D^T - (Y - X) W^T|^2 + |N D^T|^2 + lambda |D|^2, the two sets of states weighed alike."""
    shared, neutral = drawn["shared"], drawn["neutral"]
    share = len(shared) / len(neutral)
    gram = shared.T @ shared + share * neutral.T @ neutral
    ridge = 1e-3 * gram.diagonal().mean()
    wanted = (drawn["own"] - shared) @ drawn["weight"].T
    missing = (shared @ update.T - wanted).square().sum()
    return missing + share * (neutral @ update.T).square().sum() + ridge * update.square().sum()


def found(drawn, rank: int):
    return absorb(drawn["weight"], drawn["own"], Metric.of(drawn["shared"], drawn["neutral"]), rank)


def test_the_whole_update_is_the_minimum(drawn):
    update = found(drawn, DIM)
    best = (update.up @ update.down).requires_grad_()
    (slope,) = torch.autograd.grad(objective(best, drawn), best)
    assert slope.abs().max() < 1e-9


def test_a_low_rank_update_is_the_best_of_its_rank(drawn):
    update = found(drawn, 2)
    value = objective(update.up @ update.down, drawn)
    down, up = update.down.clone().requires_grad_(), update.up.clone().requires_grad_()
    slopes = torch.autograd.grad(objective(up @ down, drawn), (down, up))
    assert max(slope.abs().max() for slope in slopes) < 1e-9
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        down, up = (half + 0.1 * torch.randn(half.shape, generator=generator) for half in (update.down, update.up))
        assert objective(up @ down, drawn) > value


def test_the_objective_goes_down_with_the_rank(drawn):
    values = [objective(torch.zeros(OUT, DIM, dtype=torch.float64), drawn)]
    kept = [0.0]
    for rank in (1, 2, 4, 8, DIM):
        update = found(drawn, rank)
        assert (update.down.shape, update.up.shape) == ((rank, DIM), (OUT, rank))
        values.append(objective(update.up @ update.down, drawn))
        kept.append(update.kept)
    assert values == sorted(values, reverse=True)
    assert kept == sorted(kept)
    assert kept[-1] < 1


def test_what_is_kept_is_measured_on_the_states(drawn):
    update = found(drawn, 3)
    wanted = (drawn["own"] - drawn["shared"]) @ drawn["weight"].T
    missing = wanted - drawn["shared"] @ (update.up @ update.down).T
    assert update.kept == pytest.approx(float(1 - missing.square().sum() / wanted.square().sum()))


def test_rows_and_columns_are_equally_long(drawn):
    update = found(drawn, 5)
    torch.testing.assert_close(update.down.norm(dim=1), update.up.norm(dim=0))


def test_states_that_are_the_same_need_no_update(drawn):
    update = found(drawn | {"own": drawn["shared"]}, 3)
    assert update.kept == 1
    assert torch.equal(update.up @ update.down, torch.zeros(OUT, DIM, dtype=torch.float64))


def test_what_the_layer_cannot_tell_from_other_prompts_is_left_alone(drawn):
    """Where the states are those of neutral prompts, they ask for a change and its absence alike: half is done."""
    shared = drawn["shared"]
    own = shared @ torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    update = found(drawn | {"own": own, "neutral": shared}, DIM)
    assert update.kept == pytest.approx(0.75, abs=0.01)
