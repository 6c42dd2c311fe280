"""What a base model is called: the embedded base by its name in any case, everything else as it stands."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from diffusers_mixofshow import GradientFuser, MixOfShowPipeline, TrainingConfig, base_models, cli, toyland
from diffusers_mixofshow.base_models import (
    TOYLAND,
    TOYLAND_SD3,
    TOYLAND_XL,
    canonical_name,
    classes_of,
    dtype_argument,
    guidance_of,
    guidance_of_unet,
    known_family,
    list_devices,
    location_of,
    make_loading_error,
    name_of,
    normalise_name,
    public_name,
    usual_guidance,
)
from diffusers_mixofshow.errors import (
    ConfigurationError,
    FusionError,
    HubError,
    MissingExtraError,
    first_line,
    suggest,
)
from diffusers_mixofshow.evaluation.prompts import evaluation_prompts
from diffusers_mixofshow.families.recognition import recognise
from diffusers_mixofshow.families.sd3 import STABLE_DIFFUSION_3
from diffusers_mixofshow.sampling.loading import load_base


ANY_CASE = ("toyland", "Toyland", "TOYLAND", "toyLand")


@pytest.mark.parametrize("name", [*ANY_CASE, "toyland-sd3", "Toyland-SD3", "toyland-xl"])
def test_the_embedded_bases_are_known_in_any_case(name: str) -> None:
    known = name.lower()
    assert normalise_name(name) == canonical_name(name) == known
    assert location_of(name) == location_of(known) == str(toyland.path(known))
    assert usual_guidance(name) == 3.0
    assert classes_of(name) == classes_of("toyland")
    assert evaluation_prompts(name, "pet") == evaluation_prompts("toyland", "pet")


def test_the_second_base_is_a_stable_diffusion_3_and_loras_of_it_are_known_by_their_width() -> None:
    assert known_family("toyland-sd3") is known_family(location_of("toyland-sd3")) is STABLE_DIFFUSION_3
    site = "transformer.transformer_blocks.0.attn.add_q_proj"
    for width, name in ((160, "toyland-sd3"), (1536, "stabilityai/stable-diffusion-3.5-medium")):
        model = recognise({site: width})
        assert model is not None
        assert model.id == name


def test_a_base_of_a_package_that_is_not_installed_is_known_but_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = location_of("toyland-sd3")
    monkeypatch.setitem(sys.modules, "diffusers_mixofshow_bases", None)
    assert known_family("toyland-sd3") is STABLE_DIFFUSION_3
    assert usual_guidance("toyland-sd3") == 3.0
    assert canonical_name(folder) == folder
    for load in (location_of, toyland.path):
        with pytest.raises(
            MissingExtraError, match=r"'toyland-sd3' lies in a package .* \"diffusers-mixofshow\[bases\]\""
        ):
            load("toyland-sd3")


@pytest.mark.parametrize("name", ["user/Toyland", "Toyland2", "./Toyland", "toy-land", "", "Toyland/"])
def test_other_names_stay_as_they_are(name: str) -> None:
    assert normalise_name(name) == canonical_name(name) == location_of(name) == name


def test_a_folder_that_is_called_so_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Toyland").mkdir()
    monkeypatch.chdir(tmp_path)
    assert normalise_name("Toyland") == location_of("Toyland") == "Toyland"
    assert canonical_name("Toyland") == str(tmp_path / "Toyland")
    (tmp_path / "Toyland").rename(tmp_path / "toyland")
    assert normalise_name("toyland") == canonical_name("toyland") == "toyland"


def test_training_takes_the_embedded_bases_own_settings(tmp_path: Path) -> None:
    given = {"instance_data_dir": str(tmp_path), "concept": "rex", "class_word": "dog"}
    named = TrainingConfig.from_mapping({**given, "pretrained_model_name_or_path": "Toyland"})
    assert named == TrainingConfig.from_mapping({**given, "pretrained_model_name_or_path": "toyland"})
    assert (
        TrainingConfig(**given, pretrained_model_name_or_path="TOYLAND", resolution=64).as_record()[
            "pretrained_model_name_or_path"
        ]
        == "toyland"
    )


def test_a_pipeline_of_the_embedded_base_in_capitals() -> None:
    assert MixOfShowPipeline.from_pretrained("Toyland").unet.config.sample_size == 16


@pytest.mark.parametrize("name", ["Toyland", "TOYLAND"])
@pytest.mark.parametrize("by", ["option", "file"])
def test_verbs_know_it_in_any_case(name: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    toyland.write_photos(toyland.CONCEPTS["rex"], tmp_path / "photos", count=1)
    Path("settings.toml").write_text(f"[sample]\nbase = '{name}'\n[train]\nbase = '{name}'\n")
    first, base = ([], ["--base", name]) if by == "option" else (["--config", "settings.toml"], [])
    plans = (
        ("sample", "--prompt", "a dog", "--dry-run"),
        ("train", "photos", "--concept", "rex", "--class-word", "dog", "--output", "new", "--dry-run"),
    )
    for verb, *options in plans:
        told = CliRunner().invoke(cli.app, [*first, verb, *base, *options], catch_exceptions=False).stdout
        assert "base model: toyland, " in told
        assert "time: at least " in told


@pytest.mark.parametrize("verb", ["sample", "fuse", "evaluate", "compare", "convert"])
def test_every_option_that_names_a_base_or_its_judge_knows_it(verb: str) -> None:
    command = typer.main.get_command(cli.app).commands[verb]
    named = [option for option in command.params if {"--base", "--metric-model"} & {*option.opts}]
    assert len(named) == 1 + (verb in ("evaluate", "compare"))
    context = typer.Context(command)
    assert {option.process_value(context, "TOYLAND") for option in named} == {"toyland"}
    assert not any(option.process_value(context, None) for option in named)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_names_by_which_we_and_strangers_know_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded base, a folder of the Hub's cache, a folder of one's own, and what is not on this disk."""
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "hub" / "models--user--name--x" / "snapshots" / COMMIT
    cached.mkdir(parents=True)
    other = tmp_path / "models--user--name" / "snapshots" / "main"
    other.mkdir(parents=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "link").symlink_to(cached)
    (tmp_path / "file.safetensors").touch()
    home = tmp_path / "home"
    (home / "mine").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    table = {
        location_of("toyland"): ("toyland", "toyland"),
        location_of("toyland-sd3"): ("toyland-sd3", "toyland-sd3"),
        str(cached): ("user/name--x", "user/name--x"),
        "link": ("user/name--x", "user/name--x"),
        str(other): (str(other), "main"),
        "own": (str(tmp_path / "own"), "own"),
        "./own/": (str(tmp_path / "own"), "own"),
        "~/mine": (str(home / "mine"), "mine"),
        "~/gone": ("~/gone", "gone"),
        "file.safetensors": ("file.safetensors", "file.safetensors"),
        "user/name": ("user/name", "user/name"),
        "clients/user/name": ("clients/user/name", "name"),
        "clients\\name": ("clients\\name", "name"),
        "/gone/away": ("/gone/away", "away"),
        "../gone/away": ("../gone/away", "away"),
        "C:\\gone\\away": ("C:\\gone\\away", "away"),
        "\\\\there\\share\\away": ("\\\\there\\share\\away", "away"),
        "": ("", tmp_path.name),
        "x\0y": ("x\0y", None),
    }
    for given, (ours, public) in table.items():
        assert canonical_name(given) == ours, given
        if public is not None and given:
            assert public_name(given) == public, given
        if given:
            named = {"_name_or_path": given}
            assert name_of(SimpleNamespace(config=named)) == (given if Path(ours).is_absolute() else ours)
    assert name_of(SimpleNamespace(config={})) == name_of(object()) == ""
    assert name_of(SimpleNamespace(config={"_name_or_path": None})) == ""


def test_the_usual_guidance_is_told_by_the_u_net(tmp_path: Path) -> None:
    """A copy of the embedded base draws as it does, whatever it is called; what differs in anything does not."""
    shipped = json.loads(Path(location_of("toyland"), "unet", "config.json").read_text())
    assert usual_guidance("user/base") == usual_guidance("") == 7.5
    (tmp_path / "unet").mkdir()
    file = tmp_path / "unet" / "config.json"
    for content, guidance in (
        (json.dumps(shipped), 3.0),
        (json.dumps(shipped | {"_diffusers_version": "9"}), 3.0),
        (json.dumps(shipped | {"further": 1}), 3.0),
        (json.dumps(shipped | {"sample_size": 64}), 7.5),
        (json.dumps({name: shipped[name] for name in list(shipped)[:-1]}), 7.5),
        ("[]", 7.5),
        ("no JSON", 7.5),
        ("[" * 100_000, 7.5),
    ):
        file.write_text(content)
        assert usual_guidance(str(tmp_path)) == guidance, content[:40]
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in shipped.items()}
    assert any(isinstance(value, tuple) for value in lists.values())
    assert guidance_of_unet(lists) == 3.0
    assert guidance_of_unet({}) == 7.5


@pytest.mark.parametrize(
    ("version", "name"), [("0.39.1", "torch_dtype"), ("0.40.0", "dtype"), ("0.9.0", "torch_dtype"), ("1.0.0", "dtype")]
)
def test_diffusers_takes_a_dtype_by_the_name_of_its_version(
    monkeypatch: pytest.MonkeyPatch, version: str, name: str
) -> None:
    monkeypatch.setattr(base_models, "installed_version", lambda package: {"diffusers": version}[package])
    assert dtype_argument(torch.float16) == {name: torch.float16}


def test_a_base_that_cannot_be_loaded_says_why_and_what_may_be_meant(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bases" / "sd15").mkdir(parents=True)
    (tmp_path / "sd14").touch()
    ends = (
        "Expected a Hub id, a folder of a Stable Diffusion pipeline, or one of the package's own: 'toyland', "
        "'toyland-sd3', 'toyland-xl'. (first line.)"
    )
    error = OSError("\n first line.\nand more")
    for name, guess in (
        *(("toylnd", "toyland"), ("toyland-sd", "toyland-sd3"), ("toyland-x", "toyland-xl")),
        *(("bases/sd16", "bases/sd15"), ("bases/sd15", ""), ("sd13", "")),
    ):
        told = make_loading_error(name, error)
        assert type(told) is ConfigurationError
        hint = f" Did you mean {guess!r}?" if guess else ""
        assert str(told) == f"The base model {name!r} cannot be loaded.{hint} {ends}"
    assert type(make_loading_error("user/base", HubError("gone"))) is HubError


def test_words_of_errors() -> None:
    assert first_line(ValueError("  one.\ntwo")) == "one"
    assert first_line(ValueError("...")) == ""
    assert first_line(ValueError("no fax.")) == "no fax"
    assert first_line(KeyError()) == "KeyError"
    assert suggest("rexx", ["tom", "rex"]) == " Did you mean rex?"
    assert suggest("rex", iter(["tom"])) == ""


@pytest.mark.parametrize(
    ("cards", "apple", "expected"),
    [(0, False, "cpu"), (1, False, "cpu, cuda:0"), (2, False, "cpu, cuda:0, cuda:1"), (0, True, "cpu, mps")],
)
def test_devices_are_those_that_the_machine_has(monkeypatch, cards: int, apple: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: max(cards, 1))  # also of cards that no driver runs
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    assert list_devices() == expected
    with pytest.raises(FusionError, match=f"this machine has: {expected}.$"):
        GradientFuser(device="nowhere")


@pytest.mark.parametrize("name", [TOYLAND, TOYLAND_XL, TOYLAND_SD3])
def test_a_copy_of_an_embedded_base_is_drawn_with_the_same_guidance(tmp_path: Path, name: str) -> None:
    """By its folder, and by its parts in memory, whatever they are called; other models have their family's."""
    place = Path(location_of(name))
    shutil.copytree(place, tmp_path / "copy")
    assert usual_guidance(str(tmp_path / "copy")) == usual_guidance(name) == 3.0
    pipe = load_base(name, "cpu", concepts=False)
    assert guidance_of(pipe.components) == guidance_of(pipe.components, str(tmp_path / "copy")) == 3.0
    part = "transformer" if name == TOYLAND_SD3 else "unet"
    config = json.loads((place / part / "config.json").read_text())
    (tmp_path / "copy" / part / "config.json").write_text(json.dumps(config | {"sample_size": 128}))
    others = {TOYLAND: 7.5, TOYLAND_XL: 5.0, TOYLAND_SD3: 7.0}
    assert usual_guidance(str(tmp_path / "copy")) == others[name]


def test_a_path_that_cannot_be_looked_at_is_named_as_it_is() -> None:
    error = make_loading_error("~nosuchuser/m", OSError("no"))
    assert "'~nosuchuser/m' cannot be loaded. Expected" in str(error)
    assert public_name("~nosuchuser/m") == "m"
