"""What pictures tell of how they were made."""

from __future__ import annotations

import json
import warnings
from importlib import metadata
from pathlib import Path

import diffusers
import pytest
from PIL import Image, PngImagePlugin

from diffusers_mixofshow.base_models import public_name
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowWarning
from diffusers_mixofshow.notes import format_infotext, make_sheet_note, read_note, sampler_name, write_with_note
from infotext import parsed, text_of


KINDS = {"x.png": "PNG", "x.jpg": "JPEG", "x.webp": "WEBP"}
SETTINGS = {"Steps": 20, "Sampler": "DDIM", "CFG scale": "7.5", "Seed": 3, "Size": "64x48", "Model": "toyland"}


@pytest.mark.parametrize(
    ("prompt", "negative", "expected"),
    [
        ("a cat", "", ("a cat", "")),
        ("a cat, 4k, (red:1.2)", "blue, ugly", ("a cat, 4k, (red:1.2)", "blue, ugly")),
        ("a <potter> и кошка, 猫 🐈", "größe", ("a <potter> и кошка, 猫 🐈", "größe")),
        ("two\nlines", "of\neach", ("two lines", "of each")),
        ("a cat\nNegative prompt: no, mine", "dog", ("a cat Negative prompt: no, mine", "dog")),
        (
            "a cat\nSteps: 1, Sampler: x, Seed: 9, Size: 1x1",
            "",
            ("a cat Steps: 1, Sampler: x, Seed: 9, Size: 1x1", ""),
        ),
        ('say "hi" \\ there', " \n ", ('say "hi" \\ there', "")),
        ("", "x", ("", "x")),
    ],
)
@pytest.mark.parametrize("name", KINDS)
def test_other_programs_read_the_text(tmp_path, name, prompt, negative, expected) -> None:
    given = {**SETTINGS, "Regions": '0,1: "a", b\\', "Left out": None}
    write_with_note(
        tmp_path / name, Image.new("RGB", (8, 8)), KINDS[name], {"a": prompt}, format_infotext(prompt, negative, given)
    )
    found = parsed(text_of(tmp_path / name))
    assert (found.pop("prompt"), found.pop("negative")) == expected
    assert found == {**{key: str(value) for key, value in SETTINGS.items()}, "Regions": '0,1: "a", b\\'}
    assert read_note(tmp_path / name) == {"a": prompt}


def test_a_text_that_latin_1_holds_is_a_plain_one(tmp_path) -> None:
    """Some readers know tEXt alone; iTXt is for what it cannot hold."""
    for prompt, kinds in (("größe", (b"tEXt", b"tEXt")), ("猫", (b"iTXt", b"iTXt"))):
        write_with_note(
            tmp_path / "x.png", Image.new("RGB", (8, 8)), "PNG", {"p": prompt}, format_infotext(prompt, "", SETTINGS)
        )
        content = (tmp_path / "x.png").read_bytes()
        assert content[content.index(b"parameters") - 4 :][:4] == kinds[0]
        assert content[content.index(b"mixofshow\0") - 4 :][:4] == kinds[1]
        assert b"\x89PNG" == content[:4]
        assert content.index(b"parameters") < content.index(b"IDAT")  # readers need not read the pixels


def test_the_picture_is_the_same_with_a_note(tmp_path) -> None:
    picture = Image.linear_gradient("L").convert("RGB")
    write_with_note(tmp_path / "x.png", picture, "PNG", {"a": 1}, None)
    with Image.open(tmp_path / "x.png") as read:
        assert read.tobytes() == picture.tobytes()
        assert "parameters" not in read.text


@pytest.mark.parametrize("name", ["x.jpg", "x.webp"])
def test_a_note_that_no_jpeg_can_hold_is_left_out_and_told(tmp_path, name) -> None:
    note = {"mask": "x" * 70_000}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MixOfShowWarning)
        write_with_note(
            tmp_path / name, Image.new("RGB", (8, 8)), KINDS[name], note, format_infotext("a", "", SETTINGS)
        )
    assert parsed(text_of(tmp_path / name))["prompt"] == "a"
    if name == "x.webp":
        assert not caught
        assert read_note(tmp_path / name) == note
        return
    assert [each.category for each in caught] == [MixOfShowWarning]
    assert "Write a PNG instead" in str(caught[0].message)
    with pytest.raises(ConfigurationError, match="does not tell how it was made"):
        read_note(tmp_path / name)


def broken(path: Path, kind: str) -> Path:
    chunks = PngImagePlugin.PngInfo()
    contents = {"no json": "{", "a list": "[1]", "a number": "3", "null": "null", "deep": "[" * 100_000}
    if kind in contents:
        chunks.add_text("mixofshow", contents[kind])
    if kind == "text file":
        path.write_text("no picture")
    elif kind == "jpeg":
        exif = Image.Exif()
        exif[0x8769] = {0x927C: b"\xff\xfe a camera's own"}
        Image.new("RGB", (4, 4)).save(path, "JPEG", exif=exif)
    elif kind != "missing":
        Image.new("RGB", (4, 4)).save(path, "PNG", pnginfo=chunks)
    return path


@pytest.mark.parametrize(
    "kind", ["bare", "no json", "a list", "a number", "null", "deep", "text file", "jpeg", "missing"]
)
def test_what_does_not_tell_how_it_was_made_is_one_clear_error(tmp_path, kind) -> None:
    with pytest.raises(ConfigurationError, match=r"x\.png (does not tell|cannot be read)"):
        read_note(broken(tmp_path / "x.png", kind))


def test_places_on_this_disk_are_told_by_their_names_alone(tmp_path, monkeypatch) -> None:
    (tmp_path / "secret" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "secret")
    for source in ("base", "./base/", str(tmp_path / "secret" / "base"), "../secret/base"):
        assert public_name(source) == "base"
    assert public_name(".") == "secret"
    assert (public_name("user/repo"), public_name("toyland")) == ("user/repo", "toyland")
    assert [public_name(gone) for gone in ("/gone/base", "./base/", "../x/base", "~/x/base", r"C:\Users\me\base")] == [
        "base"
    ] * 5
    told = json.dumps(
        make_sheet_note({"row": [("a", 1)]}, base_model=str(tmp_path / "secret" / "base"), steps=1, guidance=2)
    )
    assert "secret" not in told


SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSinglestepScheduler": "DPM++ 2S",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
    "DDPMScheduler": "DDPM",
}


def test_samplers_are_called_as_elsewhere() -> None:
    assert {name: sampler_name(getattr(diffusers, name)) for name in SAMPLERS} == SAMPLERS


def test_a_sheet_tells_of_every_picture() -> None:
    rows = {"one": [("a", 3), ("b", 4)], "other": []}
    assert make_sheet_note(rows, base_model="user/base", steps=7, guidance=2.5) == {
        "version": metadata.version("diffusers-mixofshow"),
        "base_model": "user/base",
        "steps": 7,
        "guidance": 2.5,
        "rows": {"one": [{"prompt": "a", "seed": 3}, {"prompt": "b", "seed": 4}], "other": []},
    }


def test_a_jpeg_holds_as_much_as_it_can(tmp_path) -> None:
    """65,533 bytes of EXIF, with the six that mark them."""

    def told(length: int) -> bool:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MixOfShowWarning)
            write_with_note(tmp_path / "x.jpg", Image.new("RGB", (8, 8)), "JPEG", {"m": "x" * length})
        with Image.open(tmp_path / "x.jpg") as picture:
            longest.append(len(picture.info.get("exif", b"")))
        return not caught

    longest: list[int] = []
    assert told(60_000)
    room = 65_533 - longest[0]
    assert told(60_000 + room - room % 2)
    assert longest[-1] in (65_532, 65_533)
    assert not told(60_000 + room + 2)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_read_is_what_was_noted(tmp_path, name) -> None:
    note = {"größe": [1, 2.5, None, True, {"猫": "🐈"}], "empty": {}}
    write_with_note(tmp_path / name, Image.new("RGB", (8, 8), "red"), KINDS[name], note)
    assert read_note(tmp_path / name) == note
    with Image.open(tmp_path / name) as picture:
        assert picture.format == KINDS[name]
    assert "größe".encode() in (tmp_path / name).read_bytes()


def test_only_values_that_could_be_misread_are_quoted() -> None:
    """Many programs read the usual values by themselves, and know no quotes around them."""
    settings = {
        "Steps": 20,
        "Sampler": "DPM++ 2M",
        "Size": "64x64",
        "Model": "a, b",
        "Note": 'x: "y"',
        "Left out": None,
    }
    *_, last = format_infotext("a dog", "", settings).split("\n")
    assert last == 'Steps: 20, Sampler: DPM++ 2M, Size: 64x64, Model: "a, b", Note: "x: \\"y\\""'
