"""The page of `mixofshow ui` as a Space of the Hugging Face Hub. Settings: MIXOFSHOW_BASE, a Hub id or ``toyland``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def borrowing() -> Callable[..., Any]:
    """What lends a GPU for each call, on hardware that does (ZeroGPU); before torch is imported, as that asks for."""
    try:
        import spaces
    except ImportError:
        return lambda function: function
    decorate: Callable[..., Any] = spaces.GPU
    return decorate


borrow = borrowing()

from diffusers_mixofshow.ui.page import build_page, get_launch_settings  # noqa: E402
from diffusers_mixofshow.ui.session import Studio  # noqa: E402


studio = Studio(os.environ.get("MIXOFSHOW_BASE", "toyland"), os.environ.get("MIXOFSHOW_DEVICE"), local=False)
demo = build_page(studio, borrow)

if __name__ == "__main__":
    demo.launch(**get_launch_settings())
