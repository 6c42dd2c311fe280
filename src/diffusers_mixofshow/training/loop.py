"""The loop over optimiser steps: phases, learning rates, reports, interruption and resumption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from diffusers_mixofshow.training.batches import RandomBatches
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.failures import make_divergence_error
from diffusers_mixofshow.training.interruption import Interruption
from diffusers_mixofshow.training.learner import Learner


EMBEDDINGS = "embeddings"
"""Name of the parameter group of the concept's embeddings."""

_FINAL_SHARE = 0.1
"""The reported loss is the mean over this share of the steps, the last ones; single steps are noisy."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Argument of `on_step`, which is called after every optimiser step.

    Args:
        step: Steps done, from 1.
        total_steps: Steps in all.
        phase: ``embeddings`` or ``joint``.
        loss: The loss of the step's pictures, before the step.
        parts: The summands of the loss: ``denoising`` and, if used, ``attention`` and ``prior``, each weighted.
        gradient_norm: Norm of all gradients, before clipping.
        embedding_norm: Mean norm of the concept's embeddings, after the step.
        learning_rates: Parameter group to its rate, for all groups that learn in this phase.
        images_per_second: Training pictures of all processes per second, in this step.
        gpu_memory: Peak of the memory allocated on this process's GPU so far, in bytes; 0 on a CPU.
    """

    step: int
    total_steps: int
    phase: str
    loss: float
    parts: Mapping[str, float]
    gradient_norm: float
    embedding_norm: float
    learning_rates: Mapping[str, float]
    images_per_second: float
    gpu_memory: int

    def as_scalars(self) -> dict[str, float]:
        """Everything that a tracker draws as a curve, by name."""
        return {
            "loss/total": self.loss,
            **{f"loss/{name}": value for name, value in self.parts.items()},
            "norm/gradient": self.gradient_norm,
            "norm/embeddings": self.embedding_norm,
            **{f"learning_rate/{name}": value for name, value in self.learning_rates.items()},
            "speed/images_per_second": self.images_per_second,
            "memory/gpu_gigabytes": self.gpu_memory / 1e9,
        }


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A number of steps with one optimiser; parameters in no group are frozen.

    Args:
        name: ``embeddings`` or ``joint``.
        steps: Optimiser steps.
        groups: Parameter groups as optimisers take them, each with a ``name``.
    """

    name: str
    steps: int
    groups: Sequence[dict[str, Any]]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that learns in this phase."""
        return [parameter for group in self.groups for parameter in group["params"]]


@dataclass(kw_only=True)
class Position:
    """How far a training is, with the state beside the weights that is needed to resume it.

    Args:
        step: Optimiser steps done, over all phases.
        losses: The loss of every step so far.
        optimizer: State of the current phase's optimiser; empty between two phases.
        scaler: State of the loss scaler for float16; empty if there is none.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


class TrainingLoop:
    """Takes the steps of all phases, starting at `position`.

    Args:
        phases: The phases, in order.
        learner: Computes the losses of a batch.
        batches: The data.
        accelerator: Places tensors, scales the loss, and reduces over processes.
        config: All settings.
        make_optimizer: Makes an optimiser of parameter groups.
        position: Where to start; updated while the loop runs.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        learner: Learner,
        batches: RandomBatches,
        accelerator: Accelerator,
        config: TrainingConfig,
        make_optimizer: Callable[[Sequence[dict[str, Any]]], torch.optim.Optimizer],
        position: Position,
    ) -> None:
        self.phases, self.learner, self.batches = phases, learner, batches
        self.accelerator, self.config, self.make_optimizer = accelerator, config, make_optimizer
        self.position = position
        self._optimizer: Any = None

    def steps(self, interruption: Interruption) -> Iterator[StepReport]:
        """Take one step before each report that is yielded; a checkpoint may be saved whenever one is yielded.

        Args:
            interruption: Whether the user wants to stop; the loop ends after the step in which any process notices.

        Raises:
            ConfigurationError: If the loss is no longer finite; the weights are those before that step.
        """
        if self.accelerator.scaler is not None and self.position.scaler:
            self.accelerator.scaler.load_state_dict(self.position.scaler)
        before = 0
        for phase in self.phases:
            start = max(0, self.position.step - before)
            before += phase.steps
            if start < phase.steps:
                yield from self._run_phase(phase, start, interruption)
            if interruption.everywhere:
                return

    def note_state(self) -> Position:
        """Put the optimiser's and the scaler's state into the position, for a checkpoint, and return it."""
        self.position.optimizer = {} if self._optimizer is None else self._optimizer.state_dict()
        self.position.scaler = {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        return self.position

    def _run_phase(self, phase: Phase, start: int, interruption: Interruption) -> Iterator[StepReport]:
        _thaw_only(phase, self.learner)
        optimizer = self.make_optimizer(phase.groups)
        rates = [group["lr"] for group in optimizer.param_groups]
        if start:
            optimizer.load_state_dict(self.position.optimizer)
        model, self._optimizer = self.accelerator.prepare(self.learner, optimizer)
        try:
            for step in range(start, phase.steps):
                factor = learning_rate_factor(step, phase.steps, self.config)
                for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                report = self._take_step(phase, model, interruption)
                if step + 1 == phase.steps:
                    self._optimizer = None
                yield report
                if interruption.everywhere:
                    return
        finally:
            self._optimizer = None
            self.accelerator.free_memory()

    def _take_step(self, phase: Phase, model: nn.Module, interruption: Interruption) -> StepReport:
        """Take one optimiser step, on the gradients of `gradient_accumulation_steps` batches."""
        started = time.perf_counter()
        optimizer, count = self._optimizer, self.config.gradient_accumulation_steps
        sums: dict[str, torch.Tensor] = {}
        for part in range(count):
            losses = self._backward(model, last=part + 1 == count)
            sums = {name: sums.get(name, 0) + loss.detach() / count for name, loss in losses.items()}
        norm = self.accelerator.clip_grad_norm_(phase.parameters, self.config.max_grad_norm)
        losses_and_norm = self._agree([*sums.values(), norm], interruption)
        values = dict(zip([*sums, "norm"], losses_and_norm, strict=True))
        if self._is_divergent(values):
            seen = f"The loss became {values['loss']} in the {phase.name} phase, or its gradients are no longer finite"
            raise make_divergence_error(seen, self.config)
        self._freeze_grown_embeddings(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        self.position.step += 1
        self.position.losses.append(values["loss"])
        return self._make_report(phase, values, time.perf_counter() - started)

    def _backward(self, model: nn.Module, *, last: bool) -> dict[str, torch.Tensor]:
        """Add the gradients of one batch; only the last batch of a step synchronises gradients between processes."""
        batch = next(self.batches).to(self.accelerator.device)
        with nullcontext() if last else self.accelerator.no_sync(model):
            losses: dict[str, torch.Tensor] = model(batch)
            self.accelerator.backward(losses["loss"] / self.config.gradient_accumulation_steps)
        return losses

    def _agree(self, values: Sequence[torch.Tensor], interruption: Interruption) -> list[float]:
        """Average values over all processes, and tell all of them in `interruption` whether any was interrupted."""
        heard = torch.tensor(float(interruption.requested), device=self.accelerator.device)
        together = torch.stack([torch.as_tensor(value).detach().float().to(heard.device) for value in values])
        *means, interrupted = self.accelerator.reduce(torch.cat([together, heard[None]]), reduction="mean").tolist()
        interruption.everywhere = interrupted > 0
        return means

    def _is_divergent(self, values: Mapping[str, float]) -> bool:
        """Whether the loss or the gradients' norm is not finite.

        With a float16 loss scaler only the loss counts: the scaler skips steps whose gradients overflow.
        """
        watched = ("loss",) if self.accelerator.scaler is not None else ("loss", "norm")
        return not all(math.isfinite(values[name]) for name in watched)

    def _freeze_grown_embeddings(self, optimizer: Any) -> None:
        """Set the embeddings' rate to 0 in this step if their norm has reached `embedding_norm_threshold`."""
        threshold = self.config.embedding_norm_threshold
        if threshold is None or self.learner.reader.embedding_norm() < threshold:
            return
        for group in optimizer.param_groups:
            if group["name"] == EMBEDDINGS:
                group["lr"] = 0.0

    def _make_report(self, phase: Phase, values: Mapping[str, float], seconds: float) -> StepReport:
        config, device = self.config, self.accelerator.device
        pictures = config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        return StepReport(
            step=self.position.step,
            total_steps=sum(each.steps for each in self.phases),
            phase=phase.name,
            loss=values["loss"],
            parts={name: value for name, value in values.items() if name not in ("loss", "norm")},
            gradient_norm=values["norm"],
            embedding_norm=self.learner.reader.embedding_norm(),
            learning_rates={group["name"]: group["lr"] for group in self._optimizer.param_groups},
            images_per_second=pictures / seconds,
            gpu_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        )


def learning_rate_factor(step: int, steps: int, config: TrainingConfig) -> float:
    """Factor of the learning rate at a step of a phase, counted from 0.

    After the warm-up it is that of `diffusers.optimization.get_scheduler`. The warm-up differs: theirs starts at 0, so
    that the first step would change nothing.
    """
    if step < config.lr_warmup_steps:
        return (step + 1) / (config.lr_warmup_steps + 1)
    progress = (step - config.lr_warmup_steps) / (steps - config.lr_warmup_steps)
    if config.lr_scheduler == "linear":
        return 1 - progress
    if config.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_scheduler == "cosine_with_restarts":
        return 0.5 * (1 + math.cos(math.pi * (config.lr_num_cycles * progress % 1)))
    if config.lr_scheduler == "polynomial":
        return (1 - progress) ** config.lr_power
    return 1.0


def final_mean(losses: Sequence[float]) -> float:
    """Mean loss over the last tenth of the steps."""
    last = losses[-max(1, round(len(losses) * _FINAL_SHARE)) :]
    return sum(last) / len(last)


def _thaw_only(phase: Phase, learner: nn.Module) -> None:
    """Let only the phase's parameters require gradients."""
    for parameter in learner.parameters():
        parameter.requires_grad_(False)
    for parameter in phase.parameters:
        parameter.requires_grad_(True)
