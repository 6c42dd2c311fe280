"""What the tests of the page share: the embedded base, and files of concepts that fit it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from diffusers_mixofshow.ui.session import Studio
from packs import random_pack


@pytest.fixture(scope="session")
def studio() -> Studio:
    """The embedded base, loaded once; every test leaves it as it came."""
    return Studio("toyland", "cpu")


@pytest.fixture(scope="session")
def packs(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of two random concepts for the embedded base, by name."""
    folder = tmp_path_factory.mktemp("packs")
    return {name: write_pack(studio, folder / name, name, seed) for seed, name in enumerate(("rex", "tom"))}


def write_pack(studio: Studio, folder: Path, name: str, seed: int) -> Path:
    pack = random_pack(studio.pipe.components, name, ranks=(2,), seed=seed, scale=0.1, base_model="toyland")
    return dataclasses.replace(pack, training={"note": "<img src=x onerror=alert(1)>"}).save_pretrained(folder)
