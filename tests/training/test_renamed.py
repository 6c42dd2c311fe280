"""Settings go on being read by the names that they had once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diffusers_mixofshow import EDLoRATrainer, TrainingConfig, cli
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowWarning
from diffusers_mixofshow.training.checkpoints import check_same_training
from diffusers_mixofshow.training.renamed import RENAMED


NEEDED = {"instance_data_dir": "photos", "concept": "potter", "class_word": "man"}


def from_toml(folder: Path, **settings: Any) -> TrainingConfig:
    (folder / "a.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return TrainingConfig.from_file(folder / "a.toml", **NEEDED)


def from_yaml(folder: Path, **settings: Any) -> TrainingConfig:
    (folder / "a.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    return TrainingConfig.from_file(folder / "a.yaml", **NEEDED)


WAYS: dict[str, Callable[..., TrainingConfig]] = {
    "keyword": lambda folder, **settings: TrainingConfig(**NEEDED, **settings),
    "mapping": lambda folder, **settings: TrainingConfig.from_mapping(NEEDED | settings),
    "toyland": lambda folder, **settings: TrainingConfig.toyland(**NEEDED, **settings),
    "TOML": from_toml,
    "YAML": from_yaml,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("former", "name"), RENAMED.items())
def test_a_former_name_is_read_and_the_present_one_told(tmp_path: Path, way: str, former: str, name: str) -> None:
    with pytest.warns(MixOfShowWarning, match=f"{former} is called {name} now"):
        config = WAYS[way](tmp_path, **{former: 0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config == WAYS[way](tmp_path, **{name: 0.5})
    assert getattr(config, name) == 0.5
    assert former not in config.as_record()


@pytest.mark.parametrize("way", WAYS)
def test_both_names_at_once_are_refused(tmp_path: Path, way: str) -> None:
    with pytest.raises(ConfigurationError, match="text_kv_lr and text_kv_learning_rate"):
        WAYS[way](tmp_path, text_kv_lr=0.5, text_kv_learning_rate=0.5)


@pytest.mark.parametrize(("former", "name"), RENAMED.items())
def test_the_command_line_reads_it_as_well_but_does_not_advertise_it(
    monkeypatch: pytest.MonkeyPatch, former: str, name: str
) -> None:
    configs: list[TrainingConfig] = []
    monkeypatch.setattr(EDLoRATrainer, "train", lambda trainer: configs.append(trainer.config))
    option = f"--{former.replace('_', '-')}"
    command = ["train", "photos", "--concept", "potter", "--class-word", "man"]
    result = CliRunner().invoke(cli.app, [*command, option, "0.5"], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"Warning: {option} is called --{name.replace('_', '-')} now." in " ".join(result.stderr.split())
    assert getattr(configs[0], name) == 0.5
    for help_option in ("--help", "--help-all"):
        assert option not in CliRunner().invoke(cli.app, ["train", help_option]).output


def test_a_checkpoint_of_former_names_is_of_the_same_training() -> None:
    settings = TrainingConfig(**NEEDED).as_identity()
    present = {name: former for former, name in RENAMED.items()}
    before = {present.get(name, name): value for name, value in settings.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same_training(Path("checkpoint-1"), {"settings": before, "data": "x"}, settings, "x")
    changed = before | {"text_encoder_lr": 0}
    with pytest.raises(ConfigurationError, match="text_encoder_learning_rate was 0 "):
        check_same_training(Path("checkpoint-1"), {"settings": changed, "data": "x"}, settings, "x")
