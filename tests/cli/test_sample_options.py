"""`mixofshow sample` draws what the same settings draw in Python, and its files are those that were asked for."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image
from typer.testing import CliRunner

from diffusers_mixofshow import Draft, Isolation, MixOfShowPipeline, Refinement, Region, cli
from diffusers_mixofshow.cli.sample import _tell_written
from diffusers_mixofshow.errors import OverwriteError
from diffusers_mixofshow.pipelines import (
    MixOfShowAdapterPipeline,
    MixOfShowControlNetPipeline,
    MixOfShowImg2ImgPipeline,
    MixOfShowInpaintPipeline,
)
from diffusers_mixofshow.sampling.drawing import Drawn


def run(*arguments: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of regions that leave nothing to the global prompt
        return CliRunner().invoke(cli.app, ["sample", *arguments], catch_exceptions=False).stdout


def picture(path: str, mode: str = "RGB") -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert(mode)


def controlled(pipe: Any) -> Any:
    return MixOfShowControlNetPipeline.from_pipe(pipe, controlnet=[ControlNetModel.from_pretrained("net")] * 2)


def adapted(pipe: Any) -> Any:
    return MixOfShowAdapterPipeline.from_pipe(pipe, adapter=T2IAdapter.from_pretrained("adapter"))


TEXT = ("--prompt", "a <rex> here", "--negative-prompt", "blue")
NUMBERS = ("--seed", "5", "--steps", "3", "--guidance", "2.5")
BOX = "0,0,0.5,1,weight=0.7,order=1,guidance_scale=3,start=0.1,end=0.9,rounding=inward:a <rex>"
REGION = Region(
    "a <rex>",
    box=(0, 0, 0.5, 1),
    weight=0.7,
    order=1,
    guidance_scale=3,
    start=0.1,
    end=0.9,
    rounding="inward",
)
APART = ("--isolation", "--isolation-steps", "0,0.5", "--isolation-scales", "1,2")

ALL_AT_ONCE = [
    pytest.param(
        ("--prompt", "a cat"),
        {},
        None,
        lambda: {"num_inference_steps": 20, "guidance_scale": 7.5},
        id="defaults",
    ),
    pytest.param(
        (*TEXT, *NUMBERS, "--concepts", "rex", "--concepts", "tom", "--lora-scale", "0.5", "--lora-scale", "0.7",
         "--region", BOX, *APART, "--refine", "--width", "40", "--height", "24", "--dtype", "bfloat16"),
        {"rex": 0.5, "tom": 0.7},
        None,
        lambda: {"regions": [REGION], "isolation": Isolation(start=0, end=0.5, scales=(1, 2)), "draft": Draft(),
                 "refine": Refinement(), "width": 40, "height": 24},
        id="regions",
    ),
    pytest.param(
        (*TEXT, *NUMBERS, "--concepts", "rex", "--image", "photo.png", "--strength", "0.7", "--region", BOX),
        {"rex": 1},
        MixOfShowImg2ImgPipeline.from_pipe,
        lambda: {"image": [picture("photo.png")], "strength": 0.7, "regions": [REGION]},
        id="image",
    ),
    pytest.param(
        (*TEXT, *NUMBERS, "--concepts", "rex", "--image", "photo.png", "--mask", "left.png"),
        {"rex": 1},
        MixOfShowInpaintPipeline.from_pipe,
        lambda: {"image": [picture("photo.png")], "mask_image": [picture("left.png", "L")], "strength": 1.0},
        id="mask",
    ),
    pytest.param(
        (*TEXT, *NUMBERS, "--concepts", "rex", "--control", "image@net=photo.png", "--control", "image@net=other.png",
         "--control-scale", "0.4", "--control-scale", "0.8"),
        {"rex": 1},
        controlled,
        lambda: {"image": [picture("photo.png"), picture("other.png")], "controlnet_conditioning_scale": [0.4, 0.8]},
        id="control",
    ),
    pytest.param(
        (*TEXT, *NUMBERS, "--concepts", "rex", "--adapter", "image@adapter=other.png", "--control-scale", "0.4",
         "--region", BOX, "--draft"),
        {"rex": 1},
        adapted,
        lambda: {"image": picture("other.png"), "adapter_conditioning_scale": 0.4, "regions": [REGION],
                 "draft": Draft()},
        id="adapter",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "packs", "convert", "more"), ALL_AT_ONCE)
@pytest.mark.filterwarnings("ignore")
def test_the_command_line_draws_what_python_draws(place, monkeypatch, tmp_path, options, packs, convert, more) -> None:
    """No two settings are alike, so that none may be dropped or exchanged with another."""
    monkeypatch.chdir(place)
    run("--base", "base", *options, "--output", str(tmp_path / "x.png"))
    dtype = torch.bfloat16 if "bfloat16" in options else torch.float32
    pipe = MixOfShowPipeline.from_pretrained("base", dtype=dtype)
    for name, scale in packs.items():
        pipe.load_edlora(name, scale)
    named = bool(packs)
    texts = ("a <rex> here", "blue") if named else ("a cat", "")
    numbers = {"num_inference_steps": 3, "guidance_scale": 2.5} if named else {}
    noise = torch.Generator().manual_seed(5 if named else 0)
    pipe = pipe if convert is None else convert(pipe)
    (drawn,) = pipe(
        prompt=[texts[0]], negative_prompt=[texts[1]], generator=[noise], **numbers, **more()
    ).images  # fmt: skip
    assert np.array_equal(np.asarray(picture(str(tmp_path / "x.png"))), np.asarray(drawn))


QUICK = ("--base", "base", "--prompt", "a cat", "--steps", "1", "--width", "16", "--height", "16")


def outputs() -> set[str]:
    return {path.name for path in Path("out").iterdir()}


@pytest.mark.parametrize(
    ("base", "terminal", "said"),
    [("toyland", True, True), ("toyland", False, False), ("stable-diffusion-v1-5/stable-diffusion-v1-5", True, False)],
)
def test_why_pictures_are_small_is_said_once_and_only_on_a_terminal(monkeypatch, capsys, base, terminal, said) -> None:
    """A script that draws many pictures, or reads the names of the files, would have it after every one."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    drawn = Drawn(images=[Image.new("RGB", (64, 64))] * 2, scheduler=object, device="cpu", dtype="float32")
    _tell_written([Path("x-0.png"), Path("x-1.png")], drawn, base)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Wrote x-0.png, 64 x 64 pixels", "Wrote x-1.png, 64 x 64 pixels"]
    assert ["zoom in" in line for line in lines[2:]] == [True] * said


def test_options_of_the_result(place, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "photo.png"):
        (tmp_path / name).symlink_to(place / name)
    run(*QUICK)
    assert Path("sample.png").is_file()
    told = run(*QUICK, "--output", "out/x.webp", "--count", "2", "--seed", "-3")
    assert told == "Wrote out/x-0.webp, 16 x 16 pixels\nWrote out/x-1.webp, 16 x 16 pixels\n"
    assert outputs() == {"x-0.webp", "x-1.webp"}
    with pytest.raises(OverwriteError, match=r"x-0\.webp"):
        run(*QUICK, "--output", "out/x.webp", "--count", "2")
    before = Path("out/x-1.webp").read_bytes()
    told = json.loads(run(*QUICK, "--output", "out/x.webp", "--count", "2", "--overwrite", "--json"))
    assert told == {
        "pictures": [{"file": "out/x-0.webp", "seed": 0}, {"file": "out/x-1.webp", "seed": 1}],
        "base": "base", "prompt": "a cat", "regions": 0, "steps": 1, "guidance": 7.5,
    }  # fmt: skip
    assert Path("out/x-1.webp").read_bytes() != before
    with Image.open("out/x-0.webp") as drawn:
        assert (drawn.format, drawn.size) == ("WEBP", (16, 16))
    plan = ("--output", "out/y.png", "--dry-run", "--json")
    assert json.loads(run(*QUICK, *plan))["replaces"] == "nothing"
    assert outputs() == {"x-0.webp", "x-1.webp"}
    plan = ("--output", "out/x.webp", "--count", "2", "--dry-run")
    assert "\nreplaces: out/x-0.webp, out/x-1.webp; asks for --overwrite\n" in run(*QUICK, *plan)
    assert "\nreplaces: out/x-0.webp, out/x-1.webp\n" in run(*QUICK, *plan, "--overwrite")
