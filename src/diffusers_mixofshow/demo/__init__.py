"""``mixofshow demo``: the whole method on the embedded base, from photos to a page that shows and measures it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers_mixofshow.lazy import import_lazily


if TYPE_CHECKING:
    from diffusers_mixofshow.demo.settings import DemoSettings
    from diffusers_mixofshow.demo.stages import run_demo

__all__ = ["DemoSettings", "run_demo"]

__getattr__ = import_lazily(__name__, {"settings": ("DemoSettings",), "stages": ("run_demo",)})
