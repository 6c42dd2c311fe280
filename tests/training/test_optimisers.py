"""Optimisers are found by name, and a missing package is named with its extra."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_mixofshow.errors import ConfigurationError, MissingExtraError
from diffusers_mixofshow.training.optimisers import find_optimizer


def groups() -> list[dict[str, Any]]:
    return [
        {"name": name, "params": [nn.Parameter(torch.ones(2))], "lr": rate, "weight_decay": decay}
        for name, rate, decay in (("embeddings", 1e-2, 0.0), ("unet", 1e-3, 0.1))
    ]


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("SGD", torch.optim.SGD)])
def test_classes_of_torch_whatever_the_case(name: str, kind: type) -> None:
    optimizer = find_optimizer(name)(groups())
    assert type(optimizer) is kind
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        ("embeddings", 1e-2, 0.0),
        ("unet", 1e-3, 0.1),
    ]


@pytest.mark.parametrize(("name", "is_fused"), [("Adam", True), ("AdamW", True), ("SGD", True), ("Adagrad", False)])
def test_only_what_every_torch_fuses_on_every_device_is_fused(name: str, is_fused: bool) -> None:
    assert bool(find_optimizer(name)(groups()).defaults.get("fused")) is is_fused


def test_an_optimiser_without_weight_decay_gets_none() -> None:
    class Plain(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 1e-3) -> None:
            super().__init__(params, lr=lr)

    module = ModuleType("prodigyopt")
    module.Prodigy = Plain  # type: ignore[attr-defined]
    sys.modules["prodigyopt"] = module
    try:
        assert type(find_optimizer("prodigy")(groups())) is Plain
    finally:
        del sys.modules["prodigyopt"]


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"'AdamV' \(did you mean Adam or "):
        find_optimizer("AdamV")
    with pytest.raises(ConfigurationError, match="LBFGS"):
        find_optimizer("LBFGS")


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("Prodigy", "prodigyopt", "prodigy"), ("AdamW8bit", "bitsandbytes.optim", "8bit")]
)
def test_a_missing_package_is_named(name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"diffusers-mixofshow\[{extra}\]"):
        find_optimizer(name)
