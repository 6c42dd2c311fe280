"""What several tests of fusion share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from diffusers import UNet2DConditionModel


class Passes:
    """Forward passes of U-Nets: how many there were, and after how many the user presses Ctrl-C."""

    def __init__(self) -> None:
        self.allow(10**9)

    def allow(self, count: int) -> None:
        """Count from zero again, and interrupt after so many."""
        self.done, self.allowed = 0, count

    def counting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The same forward, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.done == self.allowed:
                raise KeyboardInterrupt
            self.done += 1
            return forward(*args, **kwargs)

        return counted


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    found = Passes()
    monkeypatch.setattr(UNet2DConditionModel, "forward", found.counting(UNet2DConditionModel.forward))
    return found
