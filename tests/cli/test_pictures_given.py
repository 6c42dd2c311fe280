"""Pictures and masks that the command line is given are read as everywhere in the package."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

import tiny
from diffusers_mixofshow import cli
from diffusers_mixofshow.cli.region_text import parse_region
from diffusers_mixofshow.errors import MixOfShowWarning, PictureError, RegionError
from diffusers_mixofshow.notes import read_note
from diffusers_mixofshow.regions.region import read_inside


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
    assert read_inside(region.mask).numpy().tolist() == (SQUARE > 0).tolist()


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


FRAMES = (
    ["--image", "frames.gif"],
    ["--image", "photo.png", "--mask", "frames.gif"],
    ["--control", "image@net=frames.gif"],
)


@pytest.mark.parametrize("options", FRAMES, ids=["image", "mask", "control"])
def test_what_is_odd_about_a_picture_is_told_once(
    place: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    frames = [Image.new("L", (32, 32), 255 * bright) for bright in (0, 1)]
    frames[0].paste(255, (0, 0, 16, 16))
    frames[0].save("frames.gif", save_all=True, append_images=frames[1:])
    asked = ["sample", "--base", "base", "--prompt", "x", "--steps", "2", "--output", "odd.png", "--overwrite"]
    with pytest.warns(MixOfShowWarning, match=r"frames\.gif has 2 frames, only the first is used") as caught:
        CliRunner().invoke(cli.app, [*asked, *options], catch_exceptions=False)
    assert len([one for one in caught if issubclass(one.category, MixOfShowWarning)]) == 1


def test_a_picture_tells_what_it_was_drawn_from_though_that_is_replaced(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    shutil.copy("photo.png", "x-0.png")
    shutil.copy("other.png", "x-1.png")
    before = hashlib.sha256(Path("x-0.png").read_bytes()).hexdigest()
    asked = ["sample", "--base", "base", "--prompt", "x", "--steps", "2", "--count", "2", "--output", "x.png"]
    CliRunner().invoke(cli.app, [*asked, "--image", "x-0.png", "--overwrite"], catch_exceptions=False)
    for name in ("x-0.png", "x-1.png"):
        assert read_note(Path(name))["pictures"] == {"x-0.png": before}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--image", "text.png"], "its format is not known"),
        (["--image", "photo.png", "--mask", "text.png"], "its format is not known"),
        (["--control", "image@net=text.png"], "its format is not known"),
        (["--adapter", "image@adapter=text.png"], "its format is not known"),
        (["--control", "image@net=photo.png", "--control", "canny=text.png"], "its format is not known"),
        (["--image", "empty.png"], "the file is empty"),
        (["--control", "image@net=empty.png"], "the file is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_plan_refuses_what_is_no_picture(
    place: Path, options: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    Path("text.png").write_text("no picture")
    Path("empty.png").touch()
    with pytest.raises(PictureError, match=rf"\.png is no readable picture \({reason}\)"):
        CliRunner().invoke(
            cli.app, ["sample", "--base", "base", "--prompt", "x", "--dry-run", *options], catch_exceptions=False
        )
