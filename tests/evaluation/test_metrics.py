"""Metrics against numbers computed by hand and against the paper's own table."""

from __future__ import annotations

import math

import pytest
import torch

from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.evaluation import metrics
from diffusers_mixofshow.evaluation.intervals import mean_with_interval


X = torch.tensor([[1.0, 0.0]])
Y = torch.tensor([[0.0, 3.0]])
DIAGONAL = torch.tensor([[2.0, 2.0]])


def test_clip_score_is_weighted_and_never_negative() -> None:
    assert metrics.clip_score(X, 5 * X) == pytest.approx(2.5)
    assert metrics.clip_score(X, -X) == 0.0
    assert metrics.clip_score(X, DIAGONAL) == pytest.approx(2.5 / 2**0.5)
    assert metrics.clip_score(torch.cat([X, X]), torch.cat([X, -X])) == pytest.approx(1.25)


def test_clip_score_wants_a_text_for_each_picture() -> None:
    with pytest.raises(ConfigurationError, match="one text for each picture"):
        metrics.clip_score(X, torch.cat([X, Y]))


def test_image_alignment_averages_over_all_pairs() -> None:
    assert metrics.image_alignment(torch.cat([X, Y]), X) == pytest.approx(0.5)
    assert metrics.image_alignment(X.half(), DIAGONAL.half()) == pytest.approx(0.5**0.5, abs=1e-3)


def test_identity_retention_reproduces_the_papers_table_1() -> None:
    assert metrics.identity_retention(0.818, 0.843, 0.596) == pytest.approx(0.90, abs=0.005)
    assert metrics.identity_retention(0.749, 0.843, 0.596) == pytest.approx(0.62, abs=0.005)


def test_identity_retention_needs_something_to_keep() -> None:
    with pytest.raises(ConfigurationError, match="Tune for longer"):
        metrics.identity_retention(0.5, 0.4, 0.4)


def test_nearest_concept_and_retrieval() -> None:
    references = {"x": torch.cat([X, DIAGONAL]), "y": Y}
    pictures = torch.tensor([[1.0, 0.1], [0.1, 1.0]])
    assert metrics.nearest_concept(pictures, references) == ["x", "y"]
    assert metrics.retrieval_accuracy(pictures, ["x", "x"], references) == 0.5


def test_retrieval_refuses_unequal_lengths_and_no_references() -> None:
    with pytest.raises(ConfigurationError, match="2 expected names"):
        metrics.retrieval_accuracy(X, ["x", "y"], {"x": X})
    with pytest.raises(ConfigurationError, match="no references"):
        metrics.nearest_concept(X, {})


def test_attribute_accuracy_counts_the_concepts_attributes_only() -> None:
    expected = {"eyes": "one", "hat": "crown"}
    read = [{"eyes": "one", "hat": "bare", "belly": "red"}, {"eyes": "one", "hat": "crown"}]
    assert metrics.attribute_accuracy(read, expected) == 0.75
    with pytest.raises(ConfigurationError, match="undefined"):
        metrics.attribute_accuracy([], expected)


@pytest.mark.parametrize("features", [torch.ones(3), torch.ones(0, 2), torch.ones(1, 2, dtype=torch.long)])
def test_malformed_features_are_refused(features: torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match="shape"):
        metrics.image_alignment(features, X)


def test_features_of_two_models_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="one model"):
        metrics.image_alignment(X, torch.ones(1, 3))


def test_intervals_cover_the_mean_in_95_of_100_samples() -> None:
    random = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(200):
        values = torch.rand(60, generator=random, dtype=torch.float64).tolist()
        found = mean_with_interval(values)
        assert found["mean"] == pytest.approx(sum(values) / 60, abs=1e-4)
        # Means of 60 numbers from 0 to 1 deviate by sqrt(1 / 12 / 60).
        assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * (1 / 12 / 60) ** 0.5, rel=0.3)
        hits += found["low"] <= 0.5 <= found["high"]
    assert 180 <= hits <= 198
    assert mean_with_interval([1.0] * 5) == {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 5}


def test_an_interval_ends_where_the_binomial_distribution_does() -> None:
    """Means of 1000 coins, half of them heads: 469 and 531 of 1000 are its quantiles at 2.5 and 97.5 %."""
    exact = []
    for share in (0.025, 0.975):
        total, count = 0.0, -1
        while total < share:
            count += 1
            total += math.comb(1000, count) / 2**1000
        exact.append(count / 1000)
    assert exact == [0.469, 0.531]
    found = mean_with_interval([0.0, 1.0] * 500)
    assert [found["low"], found["high"]] == pytest.approx(exact, abs=0.0025)  # 474 and 526 at 5 and 95 %
    assert (found["mean"], found["count"]) == (0.5, 1000)
    assert mean_with_interval([0.0, 1.0] * 500) == found
    coarse = mean_with_interval([0.0, 1.0] * 500, resamples=1)
    assert coarse["low"] == coarse["high"] != 0.5
    third = mean_with_interval([0.0, 0.0, 1.0])
    assert third == {"mean": 0.3333, "low": 0.0, "high": 1.0, "count": 3}  # 3.7 % of samples of three are all heads


def test_of_equally_near_concepts_the_first_is_named() -> None:
    assert metrics.nearest_concept(DIAGONAL, {"y": Y, "x": X}) == ["y"]
    assert metrics.nearest_concept(DIAGONAL, {"x": X, "y": Y}) == ["x"]


def test_the_nearest_concept_is_so_by_the_mean_over_its_photos() -> None:
    """Not by its nearest photo: one of those of "y" is the picture itself."""
    assert metrics.nearest_concept(X, {"y": torch.cat([X, -X, Y]), "x": DIAGONAL}) == ["x"]


@pytest.mark.parametrize(
    ("found", "missing"), [((0, 1), "2 attributes"), ((1, 0), "1 pictures"), ((0, 0), "0 pictures")]
)
def test_accuracy_of_nothing_is_refused(found: tuple[int, int], missing: str) -> None:
    read, expected = [{"eyes": "one"}] * found[0], dict.fromkeys(("eyes", "hat")[: 2 * found[1]], "one")
    with pytest.raises(ConfigurationError, match=missing):
        metrics.attribute_accuracy(read, expected)


@pytest.mark.parametrize(("single", "floor"), [(0.5, 0.5), (0.4, 0.5)])
def test_nothing_is_kept_of_what_was_not_gained(single: float, floor: float) -> None:
    with pytest.raises(ConfigurationError, match="undefined"):
        metrics.identity_retention(0.6, single, floor)


def test_photos_are_compared_with_the_others_of_them_alone() -> None:
    photos = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    assert metrics.likeness_among(photos) == pytest.approx((0 + 2 * 0.5**0.5) / 3)
    assert metrics.likeness_among(photos[:1]) is None
