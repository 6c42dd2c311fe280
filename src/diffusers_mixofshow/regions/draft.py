"""Drafts: the picture of a region's prompt is first drawn alone, and then put into the region."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from diffusers_mixofshow.errors import RegionError


_WIDEST = 2.0
"""Largest ratio of a draft's width to its height; a wider region is drawn in the middle of its draft."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Draw every region alone in a few steps of its own, and put it into the picture between two steps.

    A base model draws what a text describes as a whole picture: given "a <rex>, in a meadow" in each of three regions,
    it draws one large subject across all of them. A draft is a picture of its own, of the size that the model was
    trained with, so its prompt need not mention the other regions. It is made smaller and put into its region with new
    noise, and the call goes on from there.

    Args:
        steps: Denoising steps of each draft.
        until: The fraction of the call's steps after which the drafts are put in.
        repeat_subject: Whether the region's prompt in the picture itself repeats its subject as often as regions with
            a concept are there, as "a <rex> dog, a <rex> dog and a <rex> dog, in a meadow", see `repeat_subjects`.
            Otherwise the base draws one subject over several regions.

    Raises:
        RegionError: Names every defect at once.
    """

    steps: int = 3
    until: float = 0.5
    repeat_subject: bool = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        defects = []
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            defects.append(f"its steps are {self.steps!r}; expected a whole number, 1 or more")
        if not isinstance(self.until, int | float) or not 0 < self.until < 1:
            defects.append(f"its until is {self.until!r}; expected a number between 0 and 1")
        if not isinstance(self.repeat_subject, bool):
            defects.append(f"its repeat_subject is {self.repeat_subject!r}; expected True or False")
        if defects:
            raise RegionError("Draft: " + "; ".join(defects) + ".")

    def first_step_after(self, steps: int, order: int) -> int:
        """The step, counted from 0, before which drafts are put in.

        Args:
            steps: The call's forward passes, as `num_timesteps` counts them.
            order: The scheduler's passes for one step; the result is a multiple of it.
        """
        wanted = round(self.until * steps / order) * order
        return min(max(wanted, order), (steps - 1) // order * order)


@dataclass(frozen=True)
class Window:
    """The rectangle of latent cells that a draft fills, which may reach beyond the latent, and the draft's size."""

    top: int
    left: int
    height: int
    width: int
    draft_height: int
    draft_width: int

    def place(self, drafts: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Scale drafts (n, channels, draft_height, draft_width) to the window, in a latent of zeros."""
        small = functional.interpolate(
            drafts, size=(self.height, self.width), mode="bilinear", antialias=True, align_corners=False
        )
        right, bottom = width - self.left - self.width, height - self.top - self.height
        return functional.pad(small, (self.left, right, self.top, bottom))


def find_window(inside: torch.Tensor, side: int, multiple: int) -> Window:
    """Find the window of a region's draft: as large as the region, but no narrower than high.

    Models draw square and wide pictures better than narrow ones; what lies beside a narrow region is cut off.

    Args:
        inside: Which cells of the latent are the region's, booleans of shape (height, width); at least one is.
        side: Height of the draft in cells, that of the model's own pictures.
        multiple: The draft's width is a multiple of it.
    """
    rows, columns = inside.nonzero(as_tuple=True)
    top, left = int(rows.min()), int(columns.min())
    height, width = int(rows.max()) + 1 - top, int(columns.max()) + 1 - left
    taller, wider = max(0, math.ceil(width / _WIDEST) - height), max(0, height - width)
    top, left, height, width = top - taller // 2, left - wider // 2, height + taller, width + wider
    return Window(top, left, height, width, side, round(side * width / height / multiple) * multiple)
