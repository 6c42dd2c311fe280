"""Refinement: how the regions of a finished picture are redrawn, at the size of the model's own pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffusers_mixofshow.errors import RegionError


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Redraw every region of a finished picture, larger, from its own prompt; see `refine_regions`.

    Args:
        strength: Strength of image to image, above 0 and up to 1: the share of `steps` that is run.
        steps: Steps that a region would need from noise, of which `strength` is the share that is run; by default half
            of the call's.

    Raises:
        RegionError: Names every defect at once.
    """

    strength: float = 0.6
    steps: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        defects = []
        if not isinstance(self.strength, int | float) or not 0 < self.strength <= 1:
            defects.append(f"its strength is {self.strength!r}; expected a number above 0 and up to 1")
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            defects.append(f"its steps are {self.steps!r}; expected a whole number, 1 or more, or None")
        if not defects and self.steps is not None and self.steps * self.strength < 1:
            taken = f"its strength is {self.strength:g} of {self.steps} steps"
            defects.append(f"{taken}, less than a single one; expected more of either")
        if defects:
            raise RegionError("Refinement: " + "; ".join(defects) + ".")

    def choose_steps(self, call: int) -> int:
        """`steps` for a call of so many steps; by default at least as many that one is run."""
        return self.steps or max(round(call / 2), math.ceil(1 / self.strength))

    def count_runs(self, call: int) -> int:
        """How many steps are run for each region, in a call of so many steps."""
        return int(self.choose_steps(call) * self.strength)
