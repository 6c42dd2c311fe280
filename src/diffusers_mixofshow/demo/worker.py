"""A process that tunes one concept: it reads settings as JSON from standard input, and prints progress as JSON lines.

The demo starts several of them, which tune concepts in parallel with one thread each.
"""

from __future__ import annotations

import json
import sys

import torch

from diffusers_mixofshow.errors import MixOfShowError
from diffusers_mixofshow.training import EDLoRATrainer, StepReport, TrainingConfig


def tell(**message: object) -> None:
    """Send one message to the demo."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def report_step(report: StepReport) -> None:
    """Send steps and loss to the demo."""
    tell(step=report.step, total=report.total_steps, loss=report.loss)


def main() -> int:
    """Tune the concept that standard input describes, and return the exit status."""
    torch.set_num_threads(1)
    try:
        config = TrainingConfig.from_mapping(json.load(sys.stdin))
        EDLoRATrainer(config, on_step=report_step).train()
    except MixOfShowError as error:
        tell(error=str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
