"""Intervals over groups: both what other groups and what other values in them may change."""

from __future__ import annotations

import itertools

import pytest
import torch

from diffusers_mixofshow.evaluation.intervals import mean_of_groups_with_interval, mean_with_interval


def test_groups_of_one_value_are_values() -> None:
    values = [0.1, 0.4, 0.5, 0.9, 0.2]
    found, plain = mean_of_groups_with_interval([[value] for value in values]), mean_with_interval(values)
    assert found["mean"] == plain["mean"] == 0.42
    for end in ("low", "high"):
        assert found[end] == pytest.approx(plain[end], abs=0.03)


def test_groups_that_differ_count_as_a_whole() -> None:
    """Twenty values, but only two concepts: of two drawn concepts both are the same one half of the time."""
    found = mean_of_groups_with_interval([[0.0] * 10, [1.0] * 10])
    assert found == {"mean": 0.5, "low": 0.0, "high": 1.0, "count": 20}
    alike = mean_of_groups_with_interval([[0.0, 1.0] * 10] * 2)
    assert 0.25 < alike["low"] < 0.45  # of 40 coins 14 and 26 are the binomial distribution's quantiles
    assert alike["high"] == pytest.approx(1 - alike["low"], abs=0.03)


def test_every_group_counts_alike_whatever_its_size() -> None:
    found = mean_of_groups_with_interval([[1.0], [0.0] * 9])
    assert (found["mean"], found["count"]) == (0.5, 10)


def test_the_interval_is_that_of_all_draws_there_are() -> None:
    """Two groups of two values: each draw has 4 choices of groups and 16 of values."""
    groups = [[0.0, 0.3], [0.5, 1.0]]
    means = [
        (groups[one][first] + groups[one][second] + groups[other][third] + groups[other][fourth]) / 4
        for one, other, first, second, third, fourth in itertools.product(range(2), repeat=6)
    ]
    ends = torch.tensor(means, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    found = mean_of_groups_with_interval(groups, resamples=20000)
    assert [found["low"], found["high"]] == pytest.approx(ends.tolist(), abs=0.05)
    assert mean_of_groups_with_interval(groups, resamples=20000) == found
