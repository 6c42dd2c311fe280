"""The command that estimates the memory of a training on SDXL, on sizes small enough to be added up here."""

from __future__ import annotations

import re
import sys

import pytest
from torch import nn

from benchmarks import training_memory


SIDE = 256
UNET = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (4, 8),
    "cross_attention_dim": 32 + 48,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 1280 + 6 * 8,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
TEXTS = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}


def estimate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, float]:
    """What the command prints: line to gigabytes, here as thousands of bytes."""
    monkeypatch.setattr(training_memory, "UNET", training_memory.UNET | UNET)
    monkeypatch.setattr(training_memory, "VAE", VAE)
    monkeypatch.setattr(training_memory, "CLIP_L", {**TEXTS, "hidden_size": 32})
    monkeypatch.setattr(training_memory, "CLIP_G", {**TEXTS, "hidden_size": 48})
    monkeypatch.setattr(sys, "argv", ["training_memory.py", *options])
    monkeypatch.setattr(training_memory, "GIGABYTE", 1e3)
    training_memory.main()
    lines = capsys.readouterr().out.splitlines()
    return {line[:45].strip(): float(re.search(r"([\d.]+) GB \(estimated\)$", line)[1]) for line in lines}  # type: ignore[index]


def size_of(model: nn.Module, bytes_each: int) -> float:
    return round(bytes_each * sum(weights.numel() for weights in model.parameters()) / 1e3, 2)


def test_it_adds_up_and_tells_what_needs_less(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    low = estimate(monkeypatch, capsys, "--resolution", str(SIDE))
    parts = training_memory.models(training_memory.torch.bfloat16)
    held = 0.0
    for name, model in parts.items():
        assert low[f"weights of {name}"] == size_of(model, 2)
        held += low[f"weights of {name}"]
    learnt, step = low["what is learnt, with Adam's moments"], low[f"a step of 1 at {SIDE} pixels"]
    assert low["all in a step"] == pytest.approx(held + learnt + step, abs=0.1)
    for moment in ("a photo is encoded", "a sheet's picture is decoded"):
        assert low[f"all while {moment}"] > held + 2 * low["weights of vae"]  # once more, in float32
    wide = estimate(monkeypatch, capsys, "--resolution", str(4 * SIDE))
    assert wide[f"a step of 1 at {4 * SIDE} pixels"] > 1.5 * step
    assert wide["what is learnt, with Adam's moments"] == learnt
    two = estimate(monkeypatch, capsys, "--resolution", str(SIDE), "--set", "train_batch_size=2", "rank=8")
    assert two[f"a step of 2 at {SIDE} pixels"] > step
    assert two["what is learnt, with Adam's moments"] > 1.5 * learnt
    full = estimate(monkeypatch, capsys, "--resolution", str(SIDE), "--preset", "character")
    assert full["weights of unet"] == pytest.approx(2 * low["weights of unet"], abs=0.02)  # float32
