"""`mixofshow masks`: what each option does to the masks that are written, and what is told."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import tiny
from cli.commands import named_in, options_of
from cli.commands import run as run_alone
from diffusers_mixofshow import cli, make_masks
from diffusers_mixofshow.errors import ConfigurationError, OverwriteError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two CLIPSegs and three photos, one of them with a mask."""
    for seed, name in enumerate(("finder", "other")):
        tiny.clipseg(seed=seed).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "photos" / "masks").mkdir(parents=True)
    for number, colour in enumerate(("red", "green", "blue")):
        image = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
        image.paste(colour, (4, 4, 20, 30))
        image.save(tmp_path / "photos" / f"{number}.png")
    mask = Image.new("L", (48, 32))
    mask.paste(255, (4, 4, 20, 30))
    mask.save(tmp_path / "photos" / "masks" / "2.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(cli.app, ["masks", "photos", *arguments], catch_exceptions=False).stdout


def masks_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "masks").glob("*.png")}


USUAL = {"class_word": "dog", "model": "finder", "threshold": 0.5}
TABLE: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    ((), {}),
    (("--class-word", "cat"), {"class_word": "cat"}),
    (("--model", "other"), {"model": "other"}),
    (("--threshold", "0.4"), {"threshold": 0.4}),
    (("--overwrite",), {"overwrite": True}),
]
MADE: dict[tuple[str, ...], Any] = {}


@pytest.mark.parametrize(("options", "changed"), TABLE, ids=lambda each: " ".join(each) or "defaults")
def test_the_command_line_writes_the_masks_that_python_writes(place, options, changed) -> None:
    run("--class-word", "dog", "--model", "finder", *options)
    MADE[options] = masks_of(place / "photos")
    assert MADE[options].keys() == {"0.png", "1.png", "2.png"}
    for name in ("0.png", "1.png"):
        (place / "photos" / "masks" / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_masks(place / "photos", **(USUAL | changed))
    assert masks_of(place / "photos") == MADE[options]


def test_no_two_rows_of_the_table_write_the_same_masks() -> None:
    if len(MADE) < len(TABLE):
        pytest.skip("the table was not run as a whole")
    made = list(MADE.values())
    assert not any(one == other for number, one in enumerate(made) for other in made[:number])


def test_the_sheet_lies_beside_the_photos_or_where_it_is_asked_for(place) -> None:
    told = run("--class-word", "dog", "--model", "finder")
    assert told == f"Wrote masks of 2 of 2 photos that had none; 1 had one\nLook at {place / 'photos-masks.png'}\n"
    assert Image.open(place / "photos-masks.png").width > 3 * 40
    for name in masks_of(place / "photos"):
        (place / "photos" / "masks" / name).unlink()
    with pytest.raises(OverwriteError, match=r"photos-masks\.png is there already"):
        run("--class-word", "dog", "--model", "finder")
    assert not masks_of(place / "photos")
    run("--class-word", "dog", "--model", "finder", "--sheet", "look.png")
    assert Image.open(place / "look.png").height > Image.open(place / "photos-masks.png").height  # of three photos
    assert len(masks_of(place / "photos")) == 3


def test_a_plan_writes_nothing_and_loads_nothing(place) -> None:
    before = masks_of(place / "photos")
    asked = ("--class-word", "dog", "--model", "user/finder", "--threshold", "0.4")
    plan = json.loads(run(*asked, "--dry-run", "--json"))
    writes = [str(Path("photos", "masks", name)) for name in ("0.png", "1.png")] + [str(place / "photos-masks.png")]
    assert plan == {
        "photos": "2 without a mask, 1 with one",
        "looks for": "dog",
        "model": "user/finder, from the Hub or its cache",
        "threshold": 0.4,
        "writes": ", ".join(writes),
        "replaces": "nothing",
    }
    told = run(*asked, "--overwrite", "--dry-run")
    assert "photos: 3 without a mask, 0 with one\n" in told
    assert f"replaces: {Path('photos', 'masks', '2.png')}\n" in told
    assert masks_of(place / "photos") == before
    assert not (place / "photos-masks.png").exists()


def test_as_json_every_photo_is_told(place) -> None:
    told = json.loads(run("--class-word", "dog", "--model", "finder", "--json"))
    shares = [each.pop("share") for each in told["photos"]]
    assert all(0 < share < 1 for share in shares)
    assert told == {
        "folder": "photos",
        "photos": [
            {
                "photo": f"photos/{number}.png",
                "mask": f"photos/masks/{number}.png",
                "remark": told["photos"][number]["remark"],
            }
            for number in range(2)
        ],
        "masked_before": 1,
        "sheet": str(place / "photos-masks.png"),
    }
    again = json.loads(run("--class-word", "dog", "--model", "nothing is loaded", "--json"))
    assert again == {"folder": "photos", "photos": [], "masked_before": 3, "sheet": None}


def test_without_any_photo_to_do_nothing_is_loaded_and_the_sheet_stays(place) -> None:
    (place / "photos" / "0.png").unlink()
    (place / "photos" / "1.png").unlink()
    (place / "photos-masks.png").write_bytes(b"mine")
    assert (
        run("--class-word", "dog", "--model", "/no/such") == "Wrote masks of 0 of 0 photos that had none; 1 had one\n"
    )
    assert (place / "photos-masks.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--class-word", "dog"), 2, "'CIDAS/clipseg-rd64-refined' cannot be used"),
        (("--class-word", "dog", "--model", "photos"), 2, "'photos' cannot be used"),
        (("--class-word", "dog", "--threshold", "1.5"), 2, "threshold is 1.5"),
        (("--class-word", ""), 2, "class_word is empty"),
        ((), 2, "--class-word"),
    ],
)
def test_an_error_is_one_line(place, options: tuple[str, ...], code: int, told: str) -> None:
    result = run_alone("masks", "photos", *options, cwd=place)
    assert (result.returncode, result.stdout) == (code, "")
    assert told in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.stderr


def test_progress_and_unsure_photos_are_told_on_standard_error(place) -> None:
    Image.new("RGB", (48, 32), "white").save(place / "photos" / "3.png")
    result = run_alone(
        "masks", "photos", "--class-word", "dog", "--model", "finder", "--threshold", "0.001", cwd=place
    )
    assert result.returncode == 0
    assert "Loading finder ..." in result.stderr
    assert "Masks: 3/3" in result.stderr
    assert "Warning: Masks of photos:" in result.stderr


def test_every_option_is_in_one_of_these_tests() -> None:
    alone = {"--sheet", "--dry-run", "--json", "photos"}
    assert named_in(*(row for row, _ in TABLE)) | alone == options_of("masks")


def test_a_threshold_that_is_no_number_is_refused(place) -> None:
    with pytest.raises(ConfigurationError, match="threshold is nan"):
        run("--class-word", "dog", "--threshold", "nan")
