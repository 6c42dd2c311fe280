"""Fused updates in half precision, and products in full precision whatever the user has set."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.fusion.statistics import ConceptStatistics


def _delta(update: LowRank) -> torch.Tensor:
    return update.scaling * (update.up.double() @ update.down.double())


def test_halves_of_very_different_sizes_survive_half_precision() -> None:
    torch.manual_seed(0)
    sizes = torch.tensor([1e-7, 1.0, 1e7])
    update = LowRank(down=sizes[:, None] * torch.randn(3, 8), up=torch.randn(6, 3) / sizes, alpha=3.0)
    naive = LowRank(down=update.down.half(), up=update.up.half(), alpha=3.0)
    half = update.cast(torch.float16)
    assert half.down.dtype == half.up.dtype == torch.float16
    assert (_delta(half) - _delta(update)).norm() < 1e-3 * _delta(update).norm()
    assert not _delta(naive).isfinite().all()


def test_balancing_rounds_nothing_and_empty_rows_stay_empty() -> None:
    update = LowRank(down=torch.tensor([[1e-3, 3e-3], [0.0, 0.0]]), up=torch.tensor([[7.0, 0.0]]), alpha=2.0)
    double = update.cast(torch.float64)
    assert torch.equal(_delta(double), _delta(update))
    assert torch.equal(double.down[1], torch.zeros(2).double())


def test_updates_in_the_wanted_dtype_stay_as_they_are() -> None:
    update = LowRank(down=torch.ones(1, 2).half(), up=torch.ones(3, 1).half(), alpha=1.0)
    assert update.cast(torch.float16) is update


def test_statistics_are_recorded_and_settings_stay_where_the_user_allows_rounded_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device "meta" stands for a GPU; torch has no autocast for it."""
    matmul: Any = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("This torch has only the older setting.")
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        ConceptStatistics().add("layer", torch.empty(3, 4, device="meta"))
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
