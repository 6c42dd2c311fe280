"""Settings for a training of a few steps on a tiny model, and how to compare what it learnt."""

from __future__ import annotations

from pathlib import Path

import torch

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.training import TrainingConfig


def quick(photos: Path, **settings: object) -> TrainingConfig:
    defaults: dict[str, object] = {
        "instance_data_dir": photos,
        "concept": "potter",
        "class_word": "man",
        "resolution": 32,
        "max_train_steps": 2,
        "embedding_phase_steps": 1,
        "train_batch_size": 2,
        "captions_per_step": 1,
        "embedding_learning_rate": 1e-2,
        "text_encoder_learning_rate": 1e-3,
        "learning_rate": 1e-2,
        "checkpointing_steps": None,
        "num_validation_images": 0,
        "save_statistics": False,
    }
    return TrainingConfig.from_mapping(defaults | settings)


def tensors(edlora: EDLoRA) -> dict[str, torch.Tensor]:
    found = dict(edlora.embeddings)
    for site, update in edlora.lora.items():
        found |= {f"{site}.down": update.down, f"{site}.up": update.up}
    return found


def same(one: EDLoRA, other: EDLoRA) -> bool:
    """Whether two trainings learnt the same, bit for bit."""
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
