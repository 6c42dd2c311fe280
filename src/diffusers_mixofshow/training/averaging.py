"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class MovingAverage:
    """Average of parameters over about the last 1 / (1 - decay) steps.

    In the first steps the decay is smaller, (1 + step) / (10 + step), so that the initial values soon lose weight.
    diffusers' `EMAModel` applies this formula one step later, and identifies parameters by their order, where our
    checkpoints need names.

    Args:
        parameters: By name; the average starts at their present values.
        decay: Weight of the previous average in every step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the parameters after a step, counted from 1, to the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter, 1 - decay)

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Restore averages from a checkpoint."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def swap_in(self) -> Iterator[None]:
        """Give the parameters the averaged values inside the block."""
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.values[name]
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]
