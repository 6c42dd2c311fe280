"""What a base model is called: the embedded base by its name in any case, everything else as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from diffusers_mixofshow import MixOfShowPipeline, TrainingConfig, cli, toyland
from diffusers_mixofshow.base_models import known_spelling, location_of, one_name, usual_guidance
from diffusers_mixofshow.evaluation.prompts import evaluation_prompts


ANY_CASE = ("toyland", "Toyland", "TOYLAND", "toyLand")


@pytest.mark.parametrize("name", ANY_CASE)
def test_the_embedded_base_is_known_in_any_case(name: str) -> None:
    assert known_spelling(name) == one_name(name) == "toyland"
    assert location_of(name) == location_of("toyland") != name
    assert usual_guidance(name) == 3.0
    assert evaluation_prompts(name, "pet") == evaluation_prompts("toyland", "pet")


@pytest.mark.parametrize("name", ["user/Toyland", "Toyland2", "./Toyland", "toy-land", "", "Toyland/"])
def test_other_names_stay_as_they_are(name: str) -> None:
    assert known_spelling(name) == one_name(name) == location_of(name) == name


def test_a_folder_that_is_called_so_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Toyland").mkdir()
    monkeypatch.chdir(tmp_path)
    assert known_spelling("Toyland") == location_of("Toyland") == "Toyland"
    assert one_name("Toyland") == str(tmp_path / "Toyland")
    (tmp_path / "Toyland").rename(tmp_path / "toyland")
    assert known_spelling("toyland") == one_name("toyland") == "toyland"


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
