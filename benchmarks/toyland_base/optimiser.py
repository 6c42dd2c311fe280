"""Muon: momentum whose matrices are orthogonalised, with AdamW for everything that is no matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Nearest semi-orthogonal (rows, columns), roughly, by the quintic Newton-Schulz iteration of Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    result = matrix.T if tall else matrix
    result = result / (result.norm() + 1e-7)
    for _ in range(5):  # which bring all singular values near one
        gram = result @ result.T
        result = a * result + (b * gram + c * gram @ gram) @ result
    return result.T if tall else result


class Muon(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions (convolutions flattened), AdamW for the others.

    Updates are scaled to the size of AdamW's, so that one learning rate fits both halves.

    Args:
        parameters: What to train.
        learning_rate: The rate of every group; schedules set ``group["lr"]``.
        weight_decay: Decoupled decay of the matrices.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], *, learning_rate: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": learning_rate, "momentum": 0.95, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = self._matrix_update if parameter.ndim >= 2 else self._vector_update
                update(parameter, parameter.grad, self.state[parameter], group)

    def _matrix_update(
        self, parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        if not state:
            state["average"] = torch.zeros_like(gradient)
        state["average"].lerp_(gradient, 1 - group["momentum"])
        blend = gradient.lerp(state["average"], group["momentum"])
        matrix = orthogonalise(blend.reshape(len(blend), -1))
        scale = 0.2 * max(matrix.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(matrix.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def _vector_update(
        self, parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        if not state:
            state.update(step=0, average=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
        state["step"] += 1
        state["average"].lerp_(gradient, 0.1)
        state["square"].lerp_(gradient.square(), 0.01)
        average = state["average"] / (1 - 0.9 ** state["step"])
        square = state["square"] / (1 - 0.99 ** state["step"])
        parameter.addcdiv_(average, square.sqrt() + 1e-8, value=-group["lr"])
