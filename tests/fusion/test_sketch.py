"""Sketches of wide layers' Gram matrices, and fusion from them: what they keep, and what they never make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffusers_mixofshow.fusion.sketch as sketching
from diffusers_mixofshow.fusion import published
from diffusers_mixofshow.fusion.compression import Spectrum
from diffusers_mixofshow.fusion.gram import DenseGram, GramFactor, sum_grams
from diffusers_mixofshow.fusion.published import SourceStatistics
from diffusers_mixofshow.fusion.ridge import choose_ridge
from diffusers_mixofshow.fusion.sketch import GramSketch
from diffusers_mixofshow.fusion.solvers import Factors, lbfgs, target_rows
from diffusers_mixofshow.fusion.statistics import ConceptStatistics


WIDTH = 60
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def rows(rank: int, tokens: int = 400, *, seed: int = 0, decay: float = 0.0) -> torch.Tensor:
    """Features (tokens, WIDTH) in so many directions, each weaker than the one before by this exponent."""
    generator = torch.Generator().manual_seed(seed)
    strengths = torch.arange(1, rank + 1, dtype=torch.float64) ** -decay
    basis = torch.linalg.qr(torch.randn(WIDTH, rank, generator=generator, dtype=torch.float64)).Q
    return torch.randn(tokens, rank, generator=generator, dtype=torch.float64) * strengths @ basis.T


def factor_of(features: torch.Tensor, directions: int = 20) -> GramFactor:
    sketch = GramSketch(WIDTH, directions)
    for part in features.split(150):
        sketch.add(part)
    return sketch.gram(len(features))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_a_matrix_of_fewer_directions_than_the_sketch_is_found_exactly(rank: int, scale: float) -> None:
    features = scale * rows(rank)
    expected = features.T @ features / len(features)
    found = factor_of(features)
    assert (found.matrix() - expected).norm() < 1e-6 * expected.norm()
    assert found.tail <= 1e-6 * expected.diagonal().mean()
    assert found.energy == pytest.approx(1)


@pytest.mark.parametrize("directions", [8, 20, 40])
def test_of_more_directions_it_has_the_trace_and_never_more_than_there_is(directions: int) -> None:
    features = rows(WIDTH, decay=1.0)
    gram = features.T @ features / len(features)
    found = factor_of(features, directions)
    assert 0.5 * directions < len(found.rows) <= directions
    assert float(found.matrix().trace()) == pytest.approx(float(gram.trace()))
    leading = found.rows.T @ found.rows + found.tail * torch.linalg.pinv(found.rows) @ found.rows
    assert torch.linalg.eigvalsh(gram - leading).min() > -1e-9 * gram.norm()
    best_of_half = Spectrum.of(DenseGram(gram)).leading(directions // 2).matrix()
    assert (found.matrix() - gram).norm() < 2 * (best_of_half - gram).norm()
    assert 0.5 < found.energy < 1


def test_sketches_are_the_same_whatever_the_order_and_the_parts() -> None:
    features = rows(WIDTH, decay=0.5)
    whole, parts = GramSketch(WIDTH, 20), GramSketch(WIDTH, 20)
    whole.add(features)
    for part in reversed(features.split(7)):
        parts.add(part)
    torch.testing.assert_close(whole.gram(400).matrix(), parts.gram(400).matrix(), **EXACT)
    half = GramSketch(WIDTH, 20)
    half.add(features)
    torch.testing.assert_close(half.gram(800).matrix(), whole.gram(400).matrix() / 2, **EXACT)


def test_rounded_features_do_not_break_the_core() -> None:
    """float16 features whose squares overflow float16, nearly all in one direction."""
    features = (3e4 * rows(1) / rows(1).abs().max() + rows(WIDTH, seed=1) * 1e-3).half()
    sketch = GramSketch(WIDTH, 20)
    sketch.add(features.float())
    found = sketch.gram(len(features))
    gram = features.double().T @ features.double() / len(features)
    assert found.rows.isfinite().all()
    assert (found.matrix() - gram).norm() < 1e-3 * gram.norm()
    assert found.tail >= 0


def test_what_was_never_met_is_all_zero() -> None:
    sketch = GramSketch(WIDTH, 20)
    sketch.add(torch.zeros(5, WIDTH, dtype=torch.float64))
    assert not sketch.gram(5).matrix().any()


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 0.0])
@pytest.mark.parametrize("tail", [0.0, 0.2])
def test_the_inverse_of_a_factor_is_that_of_its_matrix(ridge: float, tail: float) -> None:
    gram = GramFactor(rows=rows(7, tokens=9), tail=tail, energy=1.0)
    asked = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inverse, dense = gram.inverse(ridge), DenseGram(gram.matrix()).inverse(ridge)
    torch.testing.assert_close(inverse.multiply(asked), dense.multiply(asked), rtol=1e-6, atol=1e-6)
    (solved,) = gram.solve(asked, [ridge])
    torch.testing.assert_close(solved, inverse.multiply(asked), **EXACT)
    values = torch.linalg.eigvalsh(gram.matrix())
    damped = values + ridge * values.mean()
    expected = float(damped.max() / damped.min()) if tail or ridge else float("inf")
    assert inverse.condition == pytest.approx(expected, rel=1e-3)


def test_sums_of_factors_are_those_of_matrices() -> None:
    one, two = (GramFactor(rows=rows(3, 4, seed=seed), tail=0.1 * (seed + 1), energy=1.0) for seed in (0, 1))
    dense = DenseGram(torch.eye(WIDTH, dtype=torch.float64))
    expected = 0.3 * one.matrix() + 0.7 * two.matrix()
    for as_matrix in (False, True):
        total = sum_grams([(one, 0.3), (two, 0.7)], as_matrix=as_matrix)
        assert isinstance(total, DenseGram) is as_matrix
        torch.testing.assert_close(total.matrix(), expected, **EXACT)
        with_dense = sum_grams([(one, 0.3), (dense, 2.0), (two, 0.7)], as_matrix=as_matrix)
        assert isinstance(with_dense, DenseGram)
        torch.testing.assert_close(with_dense.matrix(), expected + 2 * dense.matrix(), **EXACT)
    assert torch.equal(dense.matrix(), torch.eye(WIDTH, dtype=torch.float64))  # what is added up stays as it is


def _updates(count: int) -> list[Factors]:
    generator = torch.Generator().manual_seed(3)
    return [
        Factors(
            down=torch.randn(2, WIDTH, generator=generator, dtype=torch.float64),
            up=torch.randn(5, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def test_the_ridge_of_factors_is_that_of_their_matrices() -> None:
    updates = _updates(2)
    fit, held = ([factor_of(rows(12, seed=seed + k)) for seed in (0, 1)] for k in (0, 10))
    fitted, asked = (sum_grams((gram, 0.5) for gram in each) for each in (fit, held))
    targets, wanted = target_rows(updates, fit), target_rows(updates, held)
    dense = choose_ridge(updates, targets, wanted, DenseGram(asked.matrix()), DenseGram(fitted.matrix()))
    found = choose_ridge(updates, targets, wanted, asked, fitted)
    assert found[0] == dense[0]
    assert found[1] == pytest.approx(dense[1], rel=1e-6)


def test_the_papers_solver_takes_factors() -> None:
    updates, grams = _updates(2), [factor_of(rows(12, seed=seed)) for seed in (0, 1)]
    targets, total = target_rows(updates, grams), sum_grams((gram, 1.0) for gram in grams)
    dense, found = (lbfgs(updates, targets, each, steps=30).delta for each in (DenseGram(total.matrix()), total))
    assert (found - dense).norm() < 1e-5 * dense.norm()


def test_statistics_keep_wide_inputs_as_sketches_of_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers_mixofshow.fusion.statistics.WIDEST_MATRIX", WIDTH - 1)
    features = rows(5).float()
    found = ConceptStatistics()
    found.add("wide", features[:100].reshape(2, 50, WIDTH))
    found.add("wide", features[100:], "held_out")
    found.add("narrow", features[:, : WIDTH - 1])
    assert found.inputs == ("wide", "narrow")
    assert found.parts == ("fit", "held_out")
    assert (found.tokens("wide"), found.tokens("wide", "fit"), found.tokens("narrow")) == (400, 100, 400)
    assert isinstance(found.gram("narrow"), DenseGram)
    double = features.double()
    for part, seen in (("fit", double[:100]), ("held_out", double[100:]), (None, double)):
        expected = seen.T @ seen / len(seen)
        gram = found.gram("wide", part)
        assert isinstance(gram, GramFactor)
        assert (gram.matrix() - expected).norm() < 1e-5 * expected.norm()
    found.offload()
    with pytest.raises(KeyError):
        found.gram("never")


def test_directions_are_orthonormal_and_fixed() -> None:
    omega = sketching._directions(WIDTH, 20)
    torch.testing.assert_close(omega.T @ omega, torch.eye(20, dtype=torch.float64), **EXACT)
    assert torch.equal(omega, sketching._directions.__wrapped__(WIDTH, 20))


def _mixed(monkeypatch: pytest.MonkeyPatch) -> SourceStatistics:
    """Statistics of a wide and of a narrow input, the wide one in two parts."""
    monkeypatch.setattr("diffusers_mixofshow.fusion.statistics.WIDEST_MATRIX", WIDTH - 1)
    found = ConceptStatistics()
    found.add("wide", rows(20, decay=0.5))
    found.add("wide", rows(20, seed=1, decay=0.5), "held_out")
    found.add("narrow", rows(5)[:, :8])
    return SourceStatistics(digest="0" * 64, base_model="", recording={}, concepts={"<rex>": found})


@pytest.mark.parametrize(("max_bytes", "tolerance"), [(None, 1e-5), ("auto", 1e-2), (10**6, 1e-2)])
def test_a_file_has_matrices_and_factors_side_by_side(
    max_bytes: int | str | None, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = _mixed(monkeypatch)
    path = statistics.save(tmp_path / "x", max_bytes=max_bytes)
    found, recorded = (each.concepts["<rex>"] for each in (SourceStatistics.load(path), statistics))
    assert isinstance(found.gram("narrow"), DenseGram) is (max_bytes is None)
    for name, part in (("wide", "fit"), ("wide", "held_out"), ("wide", None), ("narrow", None)):
        assert found.tokens(name, part) == recorded.tokens(name, part)
        ours, theirs = found.gram(name, part).matrix(), recorded.gram(name, part).matrix()
        assert (ours - theirs).norm() < tolerance * recorded.gram(name).matrix().norm()
    assert found.gram("wide").tail == pytest.approx(recorded.gram("wide").tail, rel=1e-2, abs=1e-9)


def test_a_budget_is_dealt_out_over_sketches_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _mixed(monkeypatch).save(tmp_path / "x", max_bytes=2 * WIDTH * 7)
    tensors = load_file(path)
    numbers = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("|rows"))
    assert 2 * WIDTH * 5 < 2 * numbers <= 2 * WIDTH * 7
    found = SourceStatistics.load(path).concepts["<rex>"]
    assert float(found.gram("wide").matrix().trace()) == pytest.approx(
        float(_mixed(monkeypatch).concepts["<rex>"].gram("wide").matrix().trace()), rel=1e-2
    )


@pytest.mark.parametrize(("inputs", "expected"), [(1, 10_000_000), (100, 124 * 100 * 1000)])
def test_wider_bases_have_larger_files_by_default(
    inputs: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(published, "most_rows", lambda widths, budget: asked.append(budget) or 1)
    statistics = ConceptStatistics()
    for number in range(inputs):
        statistics.add(f"input {number}", torch.ones(1, 1000))
        if number == 0:
            statistics.add("input 0", torch.ones(1, 1000), "held_out")
    SourceStatistics(digest="", base_model="", recording={}, concepts={"<rex>": statistics}).save(tmp_path / "x")
    assert asked == [expected]
