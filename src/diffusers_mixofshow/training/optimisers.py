"""Optimisers by name: torch's own, those of bitsandbytes, and Prodigy."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from diffusers_mixofshow.errors import ConfigurationError, MissingExtraError
from diffusers_mixofshow.training.config import PRODIGY


_NEEDS_A_CLOSURE = ("LBFGS",)
_OF_BITSANDBYTES = ("8bit", "32bit")
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimisers that every supported torch fuses on all `_FUSED_DEVICES`; Adagrad is fused on some of them only."""
_FUSED_DEVICES = ("cpu", "cuda")

MakeOptimizer = Callable[[Sequence[dict[str, Any]]], torch.optim.Optimizer]


def find_optimizer(name: str) -> MakeOptimizer:
    """Find an optimiser by its name, upper or lower case.

    Args:
        name: A class of `torch.optim` (``AdamW``), one of bitsandbytes (``AdamW8bit``, ``PagedAdamW8bit``), or
            ``Prodigy``.

    Returns:
        A function that makes the optimiser of parameter groups, each with ``lr`` and ``weight_decay``.

    Raises:
        ConfigurationError: If none of these packages has an optimiser of this name.
        MissingExtraError: If the package that has it is not installed.
    """
    if name.lower() == PRODIGY:
        return _wrap_class(_import("prodigyopt", "prodigy").Prodigy)
    if name.lower().endswith(_OF_BITSANDBYTES):
        return _wrap_class(_find(name, _import("bitsandbytes.optim", "8bit")))
    return _wrap_class(_find(name, torch.optim))


def _wrap_class(kind: Any) -> MakeOptimizer:
    """Wrap an optimiser's class so that groups pass only settings that it knows, and a name for reports."""
    known = inspect.signature(kind).parameters

    def make(groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        settings = ("params", "name", "lr", *(("weight_decay",) if "weight_decay" in known else ()))
        fused = {"fused": True} if kind in _FUSED and _on_fused_devices(groups) else {}
        made: torch.optim.Optimizer = kind([{key: group[key] for key in settings} for group in groups], **fused)
        return made

    return make


def _on_fused_devices(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether torch can update all parameters in one fused kernel.

    With the many small matrices of a LoRA, separate kernels cost more in calls than in work.
    """
    return all(each.device.type in _FUSED_DEVICES and each.is_floating_point() for g in groups for each in g["params"])


def _find(name: str, module: Any) -> type[torch.optim.Optimizer]:
    kinds = {
        each.lower(): kind
        for each, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    found = kinds.get(name.lower())
    if found is None or found.__name__ in _NEEDS_A_CLOSURE:
        near = difflib.get_close_matches(name.lower(), kinds, n=3)
        hint = f" (did you mean {' or '.join(kinds[each].__name__ for each in near)}?)" if near else ""
        raise ConfigurationError(
            f"optimizer is {name!r}{hint}, expected a class of torch.optim such as AdamW, one of bitsandbytes such as "
            "AdamW8bit, or Prodigy."
        )
    return found


def _import(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f'This optimizer needs {module.partition(".")[0]} ({error}): pip install "diffusers-mixofshow[{extra}]"'
        ) from error
