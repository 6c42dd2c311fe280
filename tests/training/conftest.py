"""A tiny pipeline and two photos, for everything that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

import tiny
from families.pipelines import tiny_pipeline


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)


@pytest.fixture(params=["Stable Diffusion", "Stable Diffusion XL"])
def either(request: pytest.FixtureRequest) -> Any:
    """For what holds of every family whose concepts are tuned."""
    return tiny_pipeline(request.param)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "masks").mkdir(parents=True)
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a <TOK>", encoding="utf-8")
    Image.linear_gradient("L").save(folder / "masks" / "0.png")
    return folder
