"""Pictures of `mixofshow sample` tell how they were made: to other programs, to people, and to draw them again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

import packs
import tiny
from diffusers_mixofshow import cli
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowError, MixOfShowWarning
from diffusers_mixofshow.notes import read_note, write_with_note
from infotext import parsed, text_of


REGIONS = ("--region", "0,0,0.5,1,weight=0.7,feather=0.1:a <rex>", "--region", "mask=corner.png,order=1:a cat")
COMMON = ("--base", "base", "--concepts", "rex", "--prompt", "a <rex>, 猫", "--steps", "2", "--seed", "5")
SIZE = ("--width", "40", "--height", "32")


def run(*arguments: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the regions cover|the global prompt")
        CliRunner().invoke(cli.app, [*arguments, "--overwrite"], catch_exceptions=False)


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize(
    ("options", "output"),
    [
        (SIZE, "a.png"),
        ((*SIZE, "--guidance", "2", "--negative-prompt", "blue: ugly, \n bad", "--lora-scale", "0.5"), "b.png"),
        ((*SIZE, *REGIONS, "--isolation", "--isolation-steps", "0,0.5", "--isolation-scales", "1,2"), "c.png"),
        ((*SIZE, *REGIONS, "--isolation", "--steps", "3", "--refine"), "d.png"),
        ((*SIZE, "--layout", "masked.json", "--dtype", "bfloat16"), "e.png"),
        ((*SIZE, *REGIONS, "--no-draft"), "l.png"),
        (("--image", "photo.png", "--strength", "0.6"), "f.png"),
        (("--image", "photo.png", "--mask", "left.png", *REGIONS), "g.png"),
        ((*SIZE, "--control", "image@net=photo.png", "--control-scale", "0.5"), "h.png"),
        ((*SIZE, *("--adapter", "image@adapter=photo.png") * 2, "--control-scale", "0.5"), "i.png"),
        ((*SIZE, *REGIONS), "j.jpg"),
        ((*SIZE, *REGIONS), "k.webp"),
        ((), "own size.png"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_picture_is_drawn_again_from_itself(place, monkeypatch, options, output) -> None:
    monkeypatch.chdir(place)
    run("sample", *COMMON, *options, "--output", output)
    again = f"again-{output}"
    run("--config", output, "sample", "--output", again)
    assert Path(again).read_bytes() == Path(output).read_bytes()  # what it tells, too


def test_pictures_of_the_time_before_drafts_are_drawn_without(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    run("sample", *COMMON, *SIZE, *REGIONS, "--no-draft", "--output", "now.png")
    note = read_note(Path("now.png"))
    del note["sample"]["draft"]
    write_with_note(Path("then.png"), Image.open("now.png"), "PNG", note, "")
    run("--config", "then.png", "sample", "--output", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("now.png"))
    run("--config", "then.png", "sample", "--draft", "--output", "drafted.png")
    assert not np.array_equal(pixels("drafted.png"), pixels("now.png"))


def test_each_of_several_pictures_tells_its_own_seed(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    run("sample", *COMMON, *SIZE, "--count", "2", "--output", "two.png")
    assert [parsed(text_of(Path(f"two-{number}.png")))["Seed"] for number in (0, 1)] == ["5", "6"]
    run("--config", "two-1.png", "sample", "--output", "second.png")
    assert np.abs(pixels("two-1.png").astype(int) - pixels("second.png")).max() <= 2  # in a batch, or alone
    run("--config", "two-1.png", "sample", "--seed", "5", "--prompt", "a cat", "--output", "cat.png")
    told = parsed(text_of(Path("cat.png")))
    assert (told["Seed"], told["prompt"]) == ("5", "a cat")


def test_other_programs_read_what_was_asked_for(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    for name in ("x.png", "x.jpg", "x.webp"):
        run("sample", *COMMON, *SIZE, *REGIONS, "--negative-prompt", "größe", "--guidance", "2", "--output", name)
        told = parsed(text_of(Path(name)))
        assert told.pop("Version").startswith("diffusers-mixofshow ")
        assert told == {
            "prompt": "a <rex>, 猫",
            "negative": "größe",
            "Steps": "2",
            "Sampler": "DDIM",
            "CFG scale": "2",
            "Seed": "5",
            "Size": "40x32",
            "Model": "base",
            "Mix-of-Show packs": "rex",
            "Mix-of-Show regions": "0,0,0.5,1: a <rex> | mask: a cat",
        }
    run("sample", "--base", "toyland", "--prompt", "x", "--steps", "2", "--image", "photo.png", "--output", "x.png")
    told = parsed(text_of(Path("x.png")))
    assert (told["Denoising strength"], told["Model"], told["Sampler"]) == ("0.8", "toyland", "DPM++ 2M")


def test_nothing_of_this_disk_is_told_but_names(place, monkeypatch, tmp_path) -> None:
    secret = tmp_path / "of my own"
    secret.mkdir()
    monkeypatch.chdir(secret)
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    files = ("--base", f"{place}/base", "--concepts", f"{place}/rex/edlora.safetensors", "--concepts", f"{place}/tom")
    follow = ("--control", f"image@{place}/net={place}/photo.png", "--region", f"mask={place}/left.png:a <rex>")
    run("sample", *files, *follow, *SIZE, "--prompt", "a <tom>", "--steps", "1", "--output", str(secret / "x.png"))
    with Image.open("x.png") as picture:
        told = picture.text["parameters"] + picture.text["mixofshow"]
    for private in (place.name, str(place.parent), secret.name, "hf_verysecret", "/tmp", "edlora.safetensors"):
        assert private not in told
    note = read_note(Path("x.png"))
    assert [entry["name"] for entry in note["packs"]] == ["rex", "tom"]
    assert note["sample"]["control"] == ["image@net=photo.png"]


def test_what_changed_since_then_is_told(place, monkeypatch, tmp_path) -> None:
    for name in ("base", "rex", "photo.png"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    run("sample", *COMMON, "--image", "photo.png", "--output", "x.png")
    (tmp_path / "rex").unlink()
    (tmp_path / "photo.png").unlink()
    packs.random_pack(tiny.components(), "rex", seed=1).save_pretrained(tmp_path / "rex")
    Image.new("RGB", (32, 32), "red").save("photo.png")
    with pytest.warns(MixOfShowWarning, match=r"rex, photo\.png changed since x\.png was drawn"):
        run("--config", "x.png", "sample", "--output", "y.png")


def noted(path: Path, note: object) -> str:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("mixofshow", json.dumps(note))
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return str(path)


LAYOUT = {"format": "mixofshow-layout", "version": 1, "prompt": "x", "width": 32, "height": 32, "regions": []}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "other.png"}, "output 'other.png'"),
        ({"count": 100_000}, "count 100000"),
        ({"json": True, "nonsense": 1}, "json True, nonsense 1"),
        ({"image": "/etc/hostname.png"}, "image '/etc/hostname.png'"),
        ({"image": "../x.png"}, r"image '\.\./x\.png'"),
        ({"concepts": ["../../rex"]}, "concepts"),
        ({"concepts": ["a/b/c"]}, "concepts"),
        ({"base": ["base", "/root/x"]}, "base"),
        ({"base": "~root"}, "base '~root'"),
        ({"base": ".hidden"}, "base"),
        ({"control": ["image@net=/etc/x.png"]}, "control"),
        ({"control": ["image@/net=x.png"]}, "control"),
        ({"seed": "many", "steps": {"a": 1}}, "seed 'many', steps"),
        ({"seed": None}, "seed None"),
        ({"layout": "/etc/x.json"}, "layout"),
        ({"region": ["mask=/etc/x.png:y"]}, "region"),
        ({"device": "cuda"}, "device"),
        (["a"], "does not tell how it was sampled"),
        (None, "does not tell how it was sampled"),
    ],
    ids=str,
)
def test_a_strangers_picture_leads_nowhere(tmp_path, monkeypatch, options, message) -> None:
    monkeypatch.chdir(tmp_path)
    file = noted(tmp_path / "theirs.png", {"layout": LAYOUT, "sample": options})
    with pytest.raises(ConfigurationError, match=message):
        run("--config", file, "sample")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs.png"]


@pytest.mark.parametrize(
    "note",
    [
        {"sample": {}},
        {"sample": {}, "layout": []},
        {"sample": {}, "layout": {**LAYOUT, "regions": [{"prompt": "x", "mask": "/etc/hostname"}]}},
        {"sample": {}, "layout": LAYOUT | {"prompt": 3}},
        {"sample": {"steps": True, "seed": 10**30, "base": "toyland"}, "layout": LAYOUT},
    ],
    ids=str,
)
def test_a_picture_that_tells_nonsense_is_an_error_of_ours(tmp_path, monkeypatch, note) -> None:
    monkeypatch.chdir(tmp_path)
    file = noted(tmp_path / "theirs.png", note)
    result = CliRunner().invoke(cli.app, ["--config", file, "sample", "--base", "toyland", "--dry-run"])
    assert result.exit_code
    assert isinstance(result.exception, MixOfShowError | SystemExit)


def test_odd_digests_in_a_picture_are_passed_over(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = {"packs": [3, {"name": ["x"]}], "pictures": [1], "layout": LAYOUT, "sample": {"base": "toyland", "seed": 4}}
    file = noted(tmp_path / "theirs.png", odd)
    result = CliRunner().invoke(cli.app, ["--config", file, "sample", "--dry-run", "--json"], catch_exceptions=False)
    assert (json.loads(result.stdout)["seeds"], json.loads(result.stdout)["prompt"]) == ("4", "x")
