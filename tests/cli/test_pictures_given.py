"""Pictures and masks that the command line is given are read as everywhere in the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

import tiny
from diffusers_mixofshow import cli
from diffusers_mixofshow.cli.region_text import parse_region
from diffusers_mixofshow.errors import PictureError, RegionError
from diffusers_mixofshow.regions.region import pixels_inside


SQUARE = np.zeros((64, 64), np.uint8)
SQUARE[16:48, 16:48] = 255
BRUSH = Image.fromarray(np.dstack([SQUARE * 0] * 3 + [SQUARE]))
LABELS = Image.fromarray(np.repeat(np.arange(4, dtype=np.uint8), 16)[None].repeat(64, axis=0))


@pytest.mark.parametrize(
    "mask",
    [Image.fromarray(SQUARE), BRUSH, Image.fromarray(SQUARE // 255), Image.fromarray(SQUARE.astype(np.uint16) * 257)],
    ids=["black and white", "brush", "labels", "16 bits"],
)
def test_a_region_by_a_mask(tmp_path: Path, mask: Image.Image) -> None:
    mask.save(tmp_path / "m.png")
    region = parse_region(f"mask={tmp_path / 'm.png'}:a dog")
    assert region.mask is not None
    assert pixels_inside(region.mask).numpy().tolist() == (SQUARE > 0).tolist()


def test_what_a_mask_cannot_say_is_one_sentence(tmp_path: Path) -> None:
    LABELS.save(tmp_path / "m.png")
    with pytest.raises(RegionError, match=r"m\.png has 4 values, none of them white") as caught:
        parse_region(f"mask={tmp_path / 'm.png'}:a dog")
    assert "not of the form" not in str(caught.value)


def drawn(folder: Path, image: Image.Image, mask: Image.Image) -> np.ndarray:
    """What is drawn into a picture where the mask says."""
    image.save(folder / "image.png")
    mask.save(folder / "mask.png")
    given = ["--image", str(folder / "image.png"), "--mask", str(folder / "mask.png")]
    asked = [
        "sample",
        "--base",
        str(folder / "base"),
        "--prompt",
        "x",
        "--steps",
        "2",
        "--output",
        str(folder / "x.png"),
    ]
    CliRunner().invoke(cli.app, [*asked, *given], catch_exceptions=False)
    found = np.asarray(Image.open(folder / "x.png"))
    (folder / "x.png").unlink()
    return found


def test_inpainting_reads_any_kind(tmp_path: Path) -> None:
    base = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    base.save_pretrained(tmp_path / "base")
    deep = Image.fromarray(np.full((64, 64), 40000, np.uint16))
    expected = drawn(tmp_path, Image.new("RGB", (64, 64), (156, 156, 156)), Image.fromarray(SQUARE))
    assert np.array_equal(drawn(tmp_path, deep, BRUSH), expected)
    with pytest.raises(PictureError, match=r"mask\.png has 4 values"):
        drawn(tmp_path, deep, LABELS)
