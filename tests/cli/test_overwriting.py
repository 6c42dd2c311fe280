"""Every verb that writes asks for --overwrite where something is, before anything is loaded, and plans tell it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import packs
from cli import commands
from diffusers_mixofshow import cli, toyland
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowError, OverwriteError


TRAIN = ("train", "photos", "--concept", "tom", "--class-word", "dog", "--base", "toyland")


@pytest.fixture(scope="module")
def components() -> dict[str, object]:
    return dict(toyland.load_pipeline().components)


@pytest.fixture
def place(components: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two ED-LoRAs, photos, and a file or folder of every name that verbs shall write."""
    for seed, name in enumerate(("rex", "kit")):
        pack = packs.random_pack(components, name, ranks=(1,), seed=seed)
        embeddings = {token: toyland_sized(rows, components) for token, rows in pack.embeddings.items()}
        EDLoRA(**vars(pack) | {"base_model": "toyland", "embeddings": embeddings}).save_pretrained(tmp_path / name)
    toyland.write_photos(toyland.CONCEPTS["rex"], tmp_path / "photos", count=2)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "bare" / "1.png")
    for name in (
        "x-1.png",
        "x.json",
        "taken/edlora.safetensors",
        "loras/rex.safetensors",
        "rex.pth",
        "page/index.html",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "begun" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "begun" / "checkpoint-2" / "state.pt").write_bytes(b"mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def toyland_sized(rows, components):
    width = components["unet"].config.cross_attention_dim
    return rows.repeat(1, -(-width // rows.shape[1]))[:, :width]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CASES = [
    (("sample", "--base", "toyland", "--prompt", "a dog", "--output", "x.png"), "x.png", True),
    (("sample", "--base", "toyland", "--prompt", "a dog", "--output", "x.png", "--count", "2"), "x-1.png", True),
    (("fuse", "rex", "kit", "--base", "toyland", "--output", "taken"), "taken/edlora.safetensors", True),
    (("fuse", "rex", "kit", "--base", "toyland", "--output", "new", "--heat-map", "x.png"), "x.png", True),
    (("evaluate", "rex", "--record", "x.json", "--sheet", "new.png"), "x.json", True),
    (("compare", "rex", "kit", "--record", "new.json", "--sheet", "x.png"), "x.png", True),
    ((*TRAIN, "--output", "taken"), "taken/edlora.safetensors", True),
    ((*TRAIN, "--output", "begun"), "begun/checkpoint-2", True),
    ((*TRAIN, "--output", "taken", "--resume-from-checkpoint", "latest"), "taken/edlora.safetensors", True),
    ((*TRAIN, "--output", "taken", "--resume-from-checkpoint", "begun/checkpoint-2"), "taken/edlora.saf", True),
    (("convert", "rex", "loras", "--to", "kohya"), "loras/rex.safetensors", False),
    (("convert", "rex", "rex.pth", "--to", "mix-of-show"), "rex.pth", False),
    (("convert", "kit", "taken", "--to", "edlora"), "taken/edlora.safetensors", False),
    (("demo", "--output", "page"), "page/index.html", False),
    (("masks", "bare", "--class-word", "dog", "--sheet", "x.png"), "x.png", True),
]


@pytest.mark.parametrize(("arguments", "there", "plans"), CASES)
def test_a_verb_refuses_before_it_loads_and_its_plan_tells(
    place: Path, arguments: tuple[str, ...], there: str, plans: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(place)
    with pytest.raises(OverwriteError, match=f"{there}.* there already.*overwrite=True"):
        run(*arguments)
    if plans:
        (told,) = (line for line in run(*arguments, "--dry-run").splitlines() if line.startswith("replaces: "))
        assert there in told
        assert told.endswith("; asks for --overwrite")
        (told,) = (
            line for line in run(*arguments, "--dry-run", "--overwrite").splitlines() if line.startswith("replaces: ")
        )
        assert there in told
        assert "--overwrite" not in told
    assert files(place) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "--base", "toyland", "--prompt", "a dog", "--output", "new.png"),
        ("fuse", "rex", "kit", "--base", "toyland", "--output", "photos"),
        ("compare", "rex", "kit", "--record", "new.json"),
        (*TRAIN, "--output", "photos"),
        (*TRAIN, "--output", "begun", "--resume-from-checkpoint", "latest"),
        ("masks", "bare", "--class-word", "dog"),
    ],
)
def test_a_plan_of_what_is_free_replaces_nothing(place: Path, arguments: tuple[str, ...]) -> None:
    assert "\nreplaces: nothing\n" in run(*arguments, "--dry-run")


def test_what_may_be_replaced_is(place: Path) -> None:
    run("convert", "rex", "loras", "--to", "kohya", "--overwrite")
    assert (place / "loras" / "rex.safetensors").read_bytes() != b"mine"
    run("sample", "--base", "toyland", "--prompt", "a dog", "--steps", "1", "--output", "x.png", "--overwrite")
    assert Image.open("x.png").size == (64, 64)
    run("fuse", "rex", "kit", "--method", "average", "--output", "taken", "--overwrite", "--keep-sources")
    assert (place / "taken" / "sources" / "kit" / "edlora.safetensors").is_file()
    run("fuse", "kit", "rex", "--method", "average", "--output", "taken", "--overwrite")
    run("fuse", "kit", "--method", "average", "--output", "taken", "--overwrite")
    assert [path.name for path in (place / "taken" / "sources").iterdir()] == ["kit"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("compare", "rex", "kit", "--record", "new.x", "--sheet", "./new.x"), ConfigurationError),
        (("fuse", "rex", "kit", "--method", "average", "--output", "new", "--heat-map", "new"), ConfigurationError),
        (("fuse", "rex", "--output", "new", "--heat-map", "new/edlora.safetensors"), ConfigurationError),
        (("evaluate", "rex", "--record", "photos"), MixOfShowError),
    ],
)
def test_outputs_in_each_others_way_are_refused_with_and_without_leave(
    place: Path, arguments: tuple[str, ...], error: type[Exception]
) -> None:
    for more in ((), ("--overwrite",), ("--dry-run",)):
        with pytest.raises(error, match=r"a place of its own|there are folders"):
            run(*arguments, *more)


def test_the_error_speaks_of_options(place: Path) -> None:
    result = commands.run(*TRAIN, "--output", "begun")
    assert (result.returncode, result.stdout) == (cli.WRONG_USE, "")
    assert result.stderr == (
        "Error: begun/checkpoint-2 is there already, and nothing is overwritten unasked. Go on with "
        "--resume-from-checkpoint 'latest', choose another --output, or give --overwrite, which replaces it.\n"
    )
