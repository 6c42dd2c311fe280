"""One training loop for all stages: accelerate, a schedule, an average of the weights, atomic checkpoints."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import torch
from accelerate.utils import broadcast_object_list


Objective = TypeVar("Objective", bound=torch.nn.Module)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How one stage is trained.

    Args:
        minutes: Time to train for; the schedule of the learning rate follows it.
        steps: Stop after this many steps instead, where given; the schedule then follows the steps.
        learning_rate: The highest rate.
        warm_up_steps: Steps over which the rate grows from zero.
        decay_from: Fraction of the training after which the rate falls along a cosine to almost zero.
        average_decay: Decay of the running average of the weights.
        checkpoint_minutes: Time between two checkpoints.
        log_steps: Steps between two lines of progress.
        seed: Seed of the batches.
    """

    minutes: float = 5.0
    steps: int | None = None
    learning_rate: float = 1e-3
    warm_up_steps: int = 100
    decay_from: float = 0.0
    average_decay: float = 0.998
    checkpoint_minutes: float = 3.0
    log_steps: int = 50
    seed: int = 0


def learning_rate_factor(step: int, progress: float, config: LoopConfig) -> float:
    """Factor on the learning rate: linear warm-up, constant, then half a cosine from one to 0.01.

    Args:
        progress: Fraction of the training that is done, from 0 to 1.
    """
    warm = min(1.0, (step + 1) / max(1, config.warm_up_steps))
    late = max(0.0, progress - config.decay_from) / max(1e-9, 1 - config.decay_from)
    cosine = 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * min(1.0, late))))
    return warm * (0.01 + 0.99 * cosine)


def save_atomically(value: Any, path: Path) -> None:
    """`torch.save` through a temporary file, so that a kill never leaves half a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    torch.save(value, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def _update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float, step: int) -> None:
    weight = 1 - min(decay, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


class _Clock:
    """Seconds of training so far, the same on every process and carried through checkpoints."""

    def __init__(self, already: float) -> None:
        self._start = time.monotonic() - already

    def elapsed(self, shared: bool) -> float:
        seconds = [time.monotonic() - self._start]
        if shared:
            broadcast_object_list(seconds)
        return seconds[0]


class _ProgressLines:
    """Prints a line every `log_steps` steps: smoothed loss, steps a second, time, fraction done."""

    def __init__(self, accelerator: accelerate.Accelerator, log_steps: int, step: int, elapsed: float) -> None:
        self._accelerator, self._log_steps = accelerator, log_steps
        self._first = (step, elapsed)
        self._smooth: float | None = None

    def add(self, step: int, loss: float, elapsed: float, progress: float) -> None:
        self._smooth = loss if self._smooth is None else 0.98 * self._smooth + 0.02 * loss
        if step % self._log_steps == 0:
            rate = (step - self._first[0]) / max(1e-9, elapsed - self._first[1])
            pace = f"{rate:.2f} steps/s {elapsed / 60:.1f} min {100 * progress:.0f} %"
            self._accelerator.print(f"step {step} loss {self._smooth:.4f} {pace}", flush=True)


def _set_rates(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group of parameters; one with a ``share`` gets that share of it."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("share", 1.0)


def _restore(
    checkpoint: Path, objective: torch.nn.Module, average: torch.nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[int, float]:
    """Load a checkpoint into the three, if there is one; return its step and seconds of training."""
    if not checkpoint.exists():
        return 0, 0.0
    state = torch.load(checkpoint, weights_only=True)
    objective.load_state_dict(state["objective"])
    average.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"], state["elapsed"]


def train_stage(
    objective: Objective,
    batch: Callable[[torch.Generator], Any],
    config: LoopConfig,
    *,
    accelerator: accelerate.Accelerator,
    optimiser: torch.optim.Optimizer,
    checkpoint: Path,
    resume: bool,
    on_checkpoint: Callable[[Objective], None] | None = None,
) -> Objective:
    """Train `objective`, a module that maps a batch to a scalar loss, and return its averaged copy.

    Args:
        batch: Makes one batch from a generator, seeded by the config's seed, the process and the step.
        checkpoint: Where checkpoints are written, and read from with `resume`.
        on_checkpoint: Called on the main process with the averaged copy at every checkpoint.
    """
    average = copy.deepcopy(objective).requires_grad_(False)
    step, already = _restore(checkpoint, objective, average, optimiser) if resume else (0, 0.0)
    average.to(accelerator.device)
    prepared, stepper = accelerator.prepare(objective, optimiser)
    clock = _Clock(already)
    progress_lines = _ProgressLines(accelerator, config.log_steps, step, already)
    last_saved = already

    def save() -> None:
        state: dict[str, Any] = {"objective": objective, "average": average, "optimiser": optimiser}
        values = {name: part.state_dict() for name, part in state.items()}
        save_atomically(values | {"step": step, "elapsed": elapsed}, checkpoint)
        if on_checkpoint is not None:
            on_checkpoint(average)

    elapsed = already
    while True:
        if step % 10 == 0:
            elapsed = clock.elapsed(accelerator.num_processes > 1)
        progress = elapsed / (60 * config.minutes) if config.steps is None else step / config.steps
        if progress >= 1:
            break
        _set_rates(stepper, config.learning_rate * learning_rate_factor(step, progress, config))
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 64 + accelerator.process_index)
        torch.manual_seed(generator.initial_seed())  # What the objective draws is the same after a resume, too.
        loss = prepared(batch(generator))
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        stepper.step()
        stepper.zero_grad()
        _update_average(average, objective, config.average_decay, step)
        step += 1
        progress_lines.add(step, float(loss.detach()), elapsed, progress)
        if elapsed - last_saved > 60 * config.checkpoint_minutes:
            last_saved = elapsed
            if accelerator.is_main_process:
                save()
    if accelerator.is_main_process:
        save()
    accelerator.wait_for_everyone()
    return average
