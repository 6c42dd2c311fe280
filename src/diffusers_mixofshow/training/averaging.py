"""Exponential moving average of what is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class MovingAverage:
    """Average of parameters over the last steps, some 1 / (1 - decay) of them.

    In the first steps the decay is smaller, (1 + step) / (10 + step), so that the start is soon forgotten. diffusers'
    `EMAModel` has the same formula one step later, and knows parameters by their order; checkpoints have names.

    Args:
        parameters: By name; they are averaged from their present values on.
        decay: Share of the average that stays in every step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after a step, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter, 1 - decay)

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Go on from averages of before."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters have the average's values inside the block."""
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.values[name]
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]
