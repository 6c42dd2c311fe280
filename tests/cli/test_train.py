"""``mixofshow train``: options are the config's fields, and errors speak of options."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.commands import options_of
from diffusers_mixofshow import EDLoRATrainer, cli
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConfigurationError, TrainingDataError
from diffusers_mixofshow.training import TrainingConfig
from families.pipelines import tiny_pipeline


NEEDED = ["photos", "--concept", "potter", "--class-word", "man"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["train", *arguments], env={"COLUMNS": "100"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        CliRunner().invoke(cli.app, ["train", *arguments], catch_exceptions=False)
    return str(caught.value)


def test_every_setting_is_an_option_with_help() -> None:
    text = re.sub(r"[^\w<>/.,:;-]+", " ", run("--help-all"))
    for field in dataclasses.fields(TrainingConfig):
        assert f"--{field.name.replace('_', '-')}"[:20] in text
    assert "white is the concept" in text


@pytest.mark.parametrize(
    ("concept", "folder", "picture"),
    [("<con>", "con_", "con_.png"), ("rex.", "rex_", "rex..png"), ("rex", "rex", "rex.png")],
)
def test_the_folder_named_after_the_concept_is_one_that_windows_takes(
    trained: list[TrainingConfig], concept: str, folder: str, picture: str
) -> None:
    output = run("photos", "--concept", concept, "--class-word", "dog")
    (config,) = trained
    assert (config.output_dir, config.concept_to_learn.name) == (Path(folder), concept.strip("<>"))
    assert f"--output {picture}" in output


def test_switches_of_the_file_of_all_verbs_are_heard_and_the_command_line_wins(
    tmp_path: Path, trained: list[TrainingConfig]
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[train]\nmasked-loss = false\nrandom_flip = true\nsteps = 7\n")
    for more in ([], ["--masked-loss", "--no-random-flip", "--steps", "8"]):
        command = ["--config", str(file), "train", *NEEDED, *more]
        CliRunner().invoke(cli.app, command, catch_exceptions=False)
    chosen = [(config.masked_loss, config.random_flip, config.max_train_steps) for config in trained]
    assert chosen == [(False, True, 7), (True, False, 8)]


def test_names_are_whole_on_a_narrow_terminal() -> None:
    result = CliRunner().invoke(cli.app, ["train", "--help-all"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    names = [f"--{field.name.replace('_', '-')} " for field in dataclasses.fields(TrainingConfig)]
    names.remove("--pretrained-model-name-or-path ")
    assert [name for name in [*names, "--base", "--no-masked-loss"] if name not in result.output] == []


@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_examples_of_the_help_stay_on_their_lines(option: str) -> None:
    result = CliRunner().invoke(cli.app, ["train", option], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    lines = [line.strip() for line in result.output.splitlines()]
    assert "mixofshow train photos/potter --concept potter --class-word man" in lines
    assert "mixofshow train --config potter.toml --preset character --seed 1" in lines


def test_options_become_settings(trained: list[TrainingConfig]) -> None:
    run(*NEEDED, "--learning_rate", "2e-4", "--steps", "7", "--no-masked-loss", "--snr-gamma", "5", "--rank", "8")
    run(*NEEDED, "--text-kv-learning-rate", "none", "--output-dir", "here")
    first, second = trained
    assert (first.learning_rate, first.max_train_steps, first.masked_loss) == (2e-4, 7, False)
    assert (first.snr_gamma, first.rank, first.lora_alpha, first.output_dir) == (5, 8, 8, Path("potter"))
    assert (second.text_kv_learning_rate, second.output_dir, second.instance_data_dir) == (None, "here", "photos")


def test_options_win_over_the_file_and_the_file_over_the_preset(trained: list[TrainingConfig], tmp_path: Path) -> None:
    file = tmp_path / "potter.toml"
    file.write_text('preset = "toyland"\nclass_word = "dog"\nconcept = "rex"\ntrain_batch_size = 3\n')
    run("--config", str(file), "--instance-data-dir", "x", "--class-word", "critter")
    (config,) = trained
    assert (config.resolution, config.train_batch_size, config.class_word) == (64, 3, "critter")


def test_errors_name_options_and_what_stands_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "potter.toml"
    file.write_text('resolution = 500\nlr_scheduler = "step"\n')
    message = refusal("photos", "--config", str(file), "--rank", "many", "--captions-per-step", "9", "--concept", "x")
    for expected in (
        "--class-word is missing",
        "--rank is 'many', expected int",
        "lr_scheduler (potter.toml) is 'step'",
    ):
        assert expected in message
    message = refusal(*NEEDED, "--config", str(file), "--validation-steps", "9", "--num-validation-images", "0")
    assert "--validation-steps is set but --num-validation-images is 0" in message
    message = refusal(*NEEDED, "--config", str(file), "--lr-scheduler", "linear")
    assert "resolution (potter.toml) is 500" in message


def test_switches_go_on_and_off(trained: list[TrainingConfig]) -> None:
    run(*NEEDED, "--random-flip", "--no-masked-loss", "--no_save_statistics")
    (config,) = trained
    assert (config.random_flip, config.masked_loss, config.save_statistics) == (True, False, False)
    assert "Both on and off: --random-flip" in refusal(*NEEDED, "--random-flip", "--no-random-flip")


def test_photos_given_twice_are_refused() -> None:
    assert "twice" in refusal(*NEEDED, "--instance-data-dir", "others")


def test_errors_and_warnings_about_photos_name_options(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "<TOK>"}', encoding="utf-8")
    needed = [str(tmp_path), "--concept", "potter", "--class-word", "man"]
    with pytest.raises(TrainingDataError) as caught:
        CliRunner().invoke(cli.app, ["train", *needed], catch_exceptions=False)
    assert "name the captions by --caption-column" in str(caught.value)
    nowhere = ["--output-dir", str(tmp_path / "out"), "--base", str(tmp_path / "nowhere")]
    result = CliRunner().invoke(cli.app, ["train", *needed, *nowhere, "--caption-column", "prompt"])
    assert isinstance(result.exception, ConfigurationError)
    assert "Warning: Photos in" in result.stderr
    assert "b.png is not in metadata.jsonl, its captions are --instance-prompt" in result.stderr
    assert "b.png shows the same as a.png" in result.stderr


def test_a_dry_run_reads_the_photos_and_writes_nothing(trained: list[TrainingConfig], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), colour).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text(f"a <TOK> before {colour}", encoding="utf-8")
    asked = ["train", str(photos), "--concept", "rex", "--class-word", "dog", "--base", "toyland", "--dry-run"]
    result = CliRunner().invoke(cli.app, [*asked, "--output", str(tmp_path / "rex")], catch_exceptions=False)
    assert "base model: toyland" in result.stdout
    assert "concept: <rex>, a dog" in result.stdout
    assert "photos: 2 with 2 different captions, 0 with a mask" in result.stdout
    told = CliRunner().invoke(cli.app, [*asked, "--output", str(tmp_path / "rex"), "--json"], catch_exceptions=False)
    assert json.loads(told.stdout)["base model"].startswith("toyland")
    assert trained == []
    assert not (tmp_path / "rex").exists()
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    unwritable = CliRunner().invoke(cli.app, [*asked, "--output", str(tmp_path / "taken" / "rex")])
    assert "cannot be written" in str(unwritable.exception)
    (photos / "b.png").write_bytes(b"")
    assert isinstance(CliRunner().invoke(cli.app, asked).exception, TrainingDataError)


@pytest.mark.filterwarnings("ignore")
def test_a_training_is_told_as_json(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), colour).save(photos / f"{name}.png")
    short = ["--steps", "1", "--embedding-phase-steps", "1", "--no-save-statistics", "--json"]
    asked = ["train", str(photos), "--concept", "rex", "--class-word", "dog", "--base", "toyland", *short]
    result = CliRunner().invoke(cli.app, [*asked, "--output", str(tmp_path / "rex")], catch_exceptions=False)
    told = json.loads(result.stdout)
    assert told["concept"] == "<rex>"
    assert told["settings"]["max_train_steps"] == 1
    assert EDLoRA.from_pretrained(told["output"]).concepts[0].class_word == "dog"


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ((), "begins: at its start"),
        (("--resume-from-checkpoint", "none"), "begins: at its start"),
        (("--resume-from-checkpoint", "latest"), "begins: at its start"),
        (("--resume-from-checkpoint", "latest", "--output", "begun"), "begins: after begun/checkpoint-2"),
        (("--resume-from-checkpoint", "checkpoint-2", "--output", "begun"), "begins: after begun/checkpoint-2"),
        (("--resume-from-checkpoint", "begun/checkpoint-2"), "begins: after begun/checkpoint-2"),
    ],
    ids=" ".join,
)
def test_a_plan_tells_where_the_training_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Image.linear_gradient("L").resize((64, 64)).save("photos/a.png")
    Path("begun/checkpoint-2").mkdir(parents=True)
    Path("begun/checkpoint-2/state.pt").touch()
    (Path("new") / "checkpoint-9").mkdir(parents=True)  # which was not written to its end
    asked = ["train", *NEEDED, "--base", "toyland", "--output", "new", "--dry-run", *wanted]
    result = CliRunner().invoke(cli.app, asked, catch_exceptions=False)
    assert told in result.stdout.splitlines()
    vain = "latest" in wanted and "begun" not in wanted
    assert ("Warning: new has no checkpoint yet, so the training begins at its start." in result.stderr) == vain


def test_what_to_do_next_can_be_pasted(
    trained: list[TrainingConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each command is one of ours, with what it was trained on; OTHER is the one name to be put in."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    written = ["Wrote the ED-LoRA of <rex> to my dogs/rex"]
    wanted = [
        "Draw it, measure it, or fuse it with another one in place of OTHER:",
        "  mixofshow sample --concepts 'my dogs/rex' --prompt 'a <rex>' --output rex.png",
        "  mixofshow evaluate 'my dogs/rex' --photos 'rex=my photos'",
        "  mixofshow fuse 'my dogs/rex' OTHER --output fused",
    ]
    asked = ["my photos", "--concept", "rex", "--class-word", "dog", "--output", "my dogs/rex"]
    assert run(*asked).splitlines() == written + wanted
    for line in wanted[1:]:
        program, verb, *given = shlex.split(line)
        assert program == "mixofshow"
        assert {each for each in given if each.startswith("--")} <= options_of(verb)
    Path("my dogs/rex/validation").mkdir(parents=True)
    for step in (9, 400):
        Path(f"my dogs/rex/validation/step-{step:06d}.png").touch()
    look = "Look at it, above by its words alone, below with all of its LoRA: "
    assert run(*asked).splitlines() == [*written, f"{look}{Path('my dogs/rex/validation/step-000400.png')}", *wanted]
    of_the_hub = ["--dataset-name", "user/photos", *asked[1:]]
    assert "  mixofshow evaluate 'my dogs/rex'" in run(*of_the_hub).splitlines()
    assert run(*asked, "--output", "none") == "Tuned <rex>; without --output nothing was saved.\n"


def _interrupt(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """What is told after Ctrl-C in a training of these arguments, with a checkpoint of step 2 if it has a folder."""

    def stop(trainer: EDLoRATrainer) -> None:
        for name in ("checkpoint-1", "checkpoint-2"):
            if str(trainer.config.output_dir) != "empty":
                (Path(trainer.config.output_dir) / name).mkdir(parents=True, exist_ok=True)
                (Path(trainer.config.output_dir) / name / "state.pt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(EDLoRATrainer, "train", stop)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mixofshow", "train", *arguments])
    result = CliRunner().invoke(cli.app, ["train", *arguments])
    assert result.exit_code != 0
    assert "Wrote" not in result.output
    return result.stderr.splitlines()


def test_after_an_interruption_the_command_that_goes_on_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["my photos", "--concept", "rex", "--class-word", "dog", "--output", "rex"]
    command = (
        "  mixofshow train 'my photos' --concept rex --class-word dog --output rex --resume-from-checkpoint latest"
    )
    told = [f"The checkpoint is {Path('rex/checkpoint-2')}. Go on from it:", command]
    assert _interrupt(monkeypatch, *asked)[-2:] == told
    assert _interrupt(monkeypatch, *asked, "--resume-from-checkpoint", "latest")[-2:] == told
    nothing = _interrupt(monkeypatch, *asked[:-1], "empty")
    assert nothing[-1:] == ["There is no checkpoint to go on from."]


def test_errors_name_options_as_the_help_does_first() -> None:
    message = refusal(*NEEDED, "--steps", "0", "--train-batch-size", "0", "--validation-steps", "x")
    assert "--steps is 0" in message
    assert "--batch-size is 0" in message
    assert "--validation-steps is 'x'" in message


@pytest.mark.parametrize(
    ("class_word", "told"),
    [
        ("dog", ""),
        ("Dog", ""),
        ("red dog", "'red dog' is 2 tokens of the base"),
        ("zeppelin", "'zeppelin' is no word that the base knows"),
        ("blue zeppelin", "'zeppelin' is no word that the base knows"),
        ("critterr", "Similar words that the base knows: critter"),
        ("wizard", "Class words that the base knows: critter, dog, cat, vase, chair, table."),
        ("man", "The base draws critter, dog, cat, vase, chair, table alone, and no 'man'."),
    ],
)
def test_a_plan_tells_words_that_the_base_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, class_word: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Image.linear_gradient("L").resize((64, 64)).save("photos/a.png")
    asked = ["train", "photos", "--concept", "rex", "--class-word", class_word, "--base", "toyland", "--dry-run"]
    warned = CliRunner().invoke(cli.app, asked, catch_exceptions=False).stderr
    assert told in warned
    assert ("class word" in warned) == bool(told)


def test_a_folder_of_sdxl_is_planned_and_tuned_as_any_other_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_pipeline("Stable Diffusion XL").save_pretrained("base")
    Path("photos").mkdir()
    Image.linear_gradient("L").convert("RGB").save("photos/a.png")
    base = ["photos", "--concept", "potter", "--class-word", "m", "--base", "base", "--company", "0"]
    assert "steps: 800, each of 4 pictures at 1024 pixels, photos repeated" in run(*base, "--dry-run")
    small = ["--resolution", "32", "--steps", "1", "--batch-size", "1", "--num-validation-images", "0"]
    assert "Wrote the ED-LoRA of <potter> to potter" in run(*base, *small, "--no-save-statistics")
    assert "pooled.<potter1>" in EDLoRA.from_pretrained("potter").embeddings


def test_the_folder_that_was_saved_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_beside(trainer: EDLoRATrainer) -> None:
        trainer.saved_to = tmp_path / "out-2"

    monkeypatch.setattr(EDLoRATrainer, "train", save_beside)
    asked = ["--instance-data-dir", str(tmp_path), "--concept", "rex", "--class-word", "dog"]
    result = CliRunner().invoke(cli.app, ["train", *asked, "--output", str(tmp_path / "out")])
    assert f"Wrote the ED-LoRA of <rex> to {tmp_path / 'out-2'}\n" in result.output
