"""What the tests of `mixofshow sample` draw with, and those of `mixofshow train` look at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

import packs
import tiny
from diffusers_mixofshow.training import EDLoRATrainer, TrainingConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a base, a pack, a ControlNet, a T2I-Adapter, pictures, masks and layouts."""
    folder = tmp_path_factory.mktemp("place")
    components = tiny.components()
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(folder / "base")
    tiny.controlnet(components["unet"]).save_pretrained(folder / "net")
    tiny.adapter().save_pretrained(folder / "adapter")
    for name in ("rex", "tom"):
        packs.random_pack(components, name).save_pretrained(folder / name)
    slope = Image.linear_gradient("L").resize((32, 32))
    slope.convert("RGB").save(folder / "photo.png")
    slope.rotate(90).convert("RGB").save(folder / "other.png")
    for name, box in (("left", (0, 0, 16, 32)), ("corner", (0, 0, 16, 16))):
        mask = Image.new("L", (32, 32))
        mask.paste(255, box)
        mask.save(folder / f"{name}.png")
    regions = [{"prompt": "a <rex>", "mask": "left.png"}, {"prompt": "a cat", "box": [0.5, 0, 1, 1]}]
    content = {"format": "mixofshow-layout", "version": 1, "prompt": "a <rex> here", "regions": regions}
    (folder / "masked.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainingConfig]:
    """The configs that a training was started with; nothing is trained."""
    configs: list[TrainingConfig] = []
    monkeypatch.setattr(EDLoRATrainer, "train", lambda trainer: configs.append(trainer.config))
    return configs
