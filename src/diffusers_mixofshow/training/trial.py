"""Detect a diverged training by the loss of one fixed batch, now and before the first step."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from diffusers_mixofshow.training.batches import RandomBatches
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.failures import make_divergence_error
from diffusers_mixofshow.training.learner import Learner


_LARGEST_GROWTH = 2.0
_ALLOWANCE = 0.1
"""Added to the largest allowed loss, as a batch of only large timesteps starts at a loss near 0.

Targets have unit variance, so that useless predictions have a loss of 1 or more.
"""


class Trial:
    """One batch with fixed noise and timesteps, whose loss tells whether a training has diverged.

    All processes make and use it together. Drawing it does not change the batches of the training.

    Args:
        learner: Computes the loss of a batch; before the first step.
        batches: The data, at its start.
        accelerator: Averages over processes.
        config: All settings, for the message.
    """

    def __init__(
        self, learner: Learner, batches: RandomBatches, accelerator: Accelerator, config: TrainingConfig
    ) -> None:
        self._learner, self._accelerator, self._config = learner, accelerator, config
        place = batches.state_dict()
        self._batch = next(batches).to(accelerator.device)
        batches.load_state_dict(place)
        self.loss_at_start = self._loss()

    def check(self) -> None:
        """Refuse weights of a diverged training.

        Raises:
            ConfigurationError: If the loss is not finite, or far above the one before the first step.
        """
        loss = self._loss()
        if not math.isfinite(loss) or loss > _LARGEST_GROWTH * self.loss_at_start + _ALLOWANCE:
            raise make_divergence_error(
                f"The loss of the first pictures was {self.loss_at_start:.3g} and is now {loss:.3g}", self._config
            )

    @torch.no_grad()
    def _loss(self) -> float:
        with self._accelerator.autocast():
            loss = self._learner(self._batch)["denoising"].float()
        mean: torch.Tensor = self._accelerator.reduce(loss, reduction="mean")
        return float(mean)
