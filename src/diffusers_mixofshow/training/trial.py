"""Whether weights are worth keeping: the loss of one batch, before anything is learnt and with what is learnt now."""

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
"""Added to what the loss may grow to: a batch of large timesteps alone has hardly any at the start.

Targets have unit variance, so that weights which predict nothing of use cost 1 or more.
"""


class Trial:
    """One batch that tells whether a training has diverged, with the same noise and timesteps at every time.

    All processes make and use it together. The batches give the same ones afterwards as if it had not been there.

    Args:
        learner: Gives the loss of a batch; nothing is learnt yet.
        batches: The data, at its start.
        accelerator: Means over processes.
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
        """Refuse the present weights if they are of no use.

        Raises:
            ConfigurationError: If the loss is no longer finite, or far above that of the start.
        """
        loss = self._loss()
        if not math.isfinite(loss) or loss > _LARGEST_GROWTH * self.loss_at_start + _ALLOWANCE:
            raise make_divergence_error(
                f"The loss of the first pictures was {self.loss_at_start:.3g} and is {loss:.3g}", self._config
            )

    @torch.no_grad()
    def _loss(self) -> float:
        with self._accelerator.autocast():
            loss = self._learner(self._batch)["denoising"].float()
        mean: torch.Tensor = self._accelerator.reduce(loss, reduction="mean")
        return float(mean)
