"""Two processes train together: stopped in one of them, both go on to the same bits."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusers_mixofshow.edlora import EDLoRA
from short_training import same


WORKER = """
import os, signal, sys
from pathlib import Path
from diffusers import StableDiffusionPipeline
import tiny
from diffusers_mixofshow.training import EDLoRATrainer
from short_training import quick

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

def train(name, on_step=None, **settings):
    settings |= {"max_train_steps": 3, "gradient_accumulation_steps": 2, "output_dir": folder / name}
    pipeline = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    EDLoRATrainer(quick(folder / "photos", **settings), pipeline, on_step=on_step).train()

def press(report):
    if report.step == 1 and rank == 1:
        os.kill(os.getpid(), signal.SIGINT)

train("whole")
try:
    train("stopped", press)
except KeyboardInterrupt:
    train("stopped", resume_from_checkpoint="latest")
"""


@pytest.mark.slow
def test_an_interrupted_training_of_two_goes_on_to_the_same_bits(photos: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment = os.environ | shared | {"PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=500)[1].decode()[-2000:] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    checkpoint = tmp_path / "stopped" / "checkpoint-2"
    assert {"process-0.pt", "process-1.pt", "state.pt"} < {path.name for path in checkpoint.iterdir()}
    states = [torch.load(checkpoint / f"process-{rank}.pt", weights_only=True) for rank in range(2)]
    assert not torch.equal(*(state["batches"]["generator"] for state in states))
    whole, resumed = (EDLoRA.from_pretrained(tmp_path / name) for name in ("whole", "stopped"))
    assert same(whole, resumed)
    assert resumed.training["processes"] == 2
