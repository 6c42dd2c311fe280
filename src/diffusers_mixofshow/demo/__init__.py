"""``mixofshow demo``: the whole method on the embedded base, from photos to a page that shows and measures it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from diffusers_mixofshow.demo.settings import DemoSettings
    from diffusers_mixofshow.demo.stages import run_demo

__all__ = ["DemoSettings", "run_demo"]

_HOMES = {"DemoSettings": "settings", "run_demo": "stages"}


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
