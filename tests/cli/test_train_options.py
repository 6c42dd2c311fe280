"""`mixofshow train`: every option sets the setting that it is called after, and no other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.commands import named_in, options_of
from diffusers_mixofshow import cli
from diffusers_mixofshow.training import TrainingConfig
from diffusers_mixofshow.training.presets import PRESETS
from diffusers_mixofshow.training.renamed import RENAMED


NEEDED = ("--concept", "potter", "--class-word", "man")
USUAL = TrainingConfig(concept="potter", class_word="man", output_dir=Path("potter"), instance_data_dir="photos")
SET = {
    "--instance-data-dir x": {"instance_data_dir": "x"},
    "--dataset-name user/photos": {"instance_data_dir": None, "dataset_name": "user/photos"},
    "--concept rex": {"concept": "rex", "output_dir": Path("rex")},
    "--class-word dog": {"class_word": "dog"},
    "--kind pet": {"kind": "pet"},
    "--base x": {"pretrained_model_name_or_path": "x"},
    "--pretrained-model-name-or-path x": {"pretrained_model_name_or_path": "x"},
    "--output x": {"output_dir": "x"},
    "--output-dir x": {"output_dir": "x"},
    "--overwrite": {"overwrite": True},
    "--seed 7": {"seed": 7},
    "--resolution 64": {"resolution": 64},
    "--center-crop": {"center_crop": True},
    "--crop-variants 2": {"crop_variants": 2},
    "--framing place": {"framing": "place"},
    "--latents-dir x": {"latents_dir": "x"},
    "--random-flip": {"random_flip": True},
    "--caption-column x": {"caption_column": "x"},
    "--instance-prompt <TOK>": {"instance_prompt": ("<TOK>",)},
    "--company 0.2": {"company": 0.2},
    "--tag-shuffles 2": {"tag_shuffles": 2},
    "--proportion-empty-prompts 0.2": {"proportion_empty_prompts": 0.2},
    "--batch-size 2": {"train_batch_size": 2},
    "--train-batch-size 3": {"train_batch_size": 3},
    "--captions-per-step 2": {"captions_per_step": 2},
    "--steps 9": {"max_train_steps": 9},
    "--max-train-steps 8": {"max_train_steps": 8},
    "--embedding-phase-steps 2": {"embedding_phase_steps": 2},
    "--embedding-learning-rate 2e-3": {"embedding_learning_rate": 2e-3},
    "--text-encoder-learning-rate 2e-5": {"text_encoder_learning_rate": 2e-5},
    "--learning-rate 2e-4": {"learning_rate": 2e-4},
    "--text-kv-learning-rate 3e-4": {"text_kv_learning_rate": 3e-4},
    "--lr-scheduler constant": {"lr_scheduler": "constant"},
    "--lr-warmup-steps 2": {"lr_warmup_steps": 2},
    "--adam-weight-decay 0.2": {"adam_weight_decay": 0.2},
    "--max-grad-norm 0.5": {"max_grad_norm": 0.5},
    "--rank 2": {"rank": 2, "lora_alpha": 2},
    "--lora-alpha 2": {"lora_alpha": 2},
    "--no-keep-start-token": {"keep_start_token": False},
    "--noise-offset 0.2": {"noise_offset": 0.2},
    "--snr-gamma 5": {"snr_gamma": 5},
    "--no-masked-loss": {"masked_loss": False},
    "--initializer-std 0.2": {"initializer_std": 0.2},
    "--mixed-precision bf16": {"mixed_precision": "bf16"},
    "--method ed-lora-shared-layers": {"method": "ed-lora-shared-layers"},
    "--optimizer SGD": {"optimizer": "SGD"},
    "--lr-num-cycles 2": {"lr_num_cycles": 2},
    "--lr-power 2": {"lr_power": 2},
    "--gradient-accumulation-steps 2": {"gradient_accumulation_steps": 2},
    "--ema-decay 0.9": {"ema_decay": 0.9},
    "--embedding-norm-threshold 0.5": {"embedding_norm_threshold": 0.5},
    "--attn-reg-weight 0.2": {"attn_reg_weight": 0.2},
    "--reg-full-identity --attn-reg-weight 0.2": {"reg_full_identity": True, "attn_reg_weight": 0.2},
    "--class-data-dir x --class-prompt man": {"class_data_dir": "x", "class_prompt": "man"},
    "--num-class-images 9": {"num_class_images": 9},
    "--prior-loss-weight 0.2": {"prior_loss_weight": 0.2},
    "--gradient-checkpointing": {"gradient_checkpointing": True},
    "--torch-compile": {"torch_compile": True},
    "--checkpointing-steps 9": {"checkpointing_steps": 9},
    "--checkpointing-steps none": {"checkpointing_steps": None},
    "--checkpoints-total-limit 3": {"checkpoints_total_limit": 3},
    "--resume-from-checkpoint latest": {"resume_from_checkpoint": "latest"},
    "--report-to tensorboard": {"report_to": "tensorboard"},
    "--validation-prompt <TOK>": {"validation_prompt": "<TOK>"},
    "--validation-steps 9": {"validation_steps": 9},
    "--num-validation-images 2": {"num_validation_images": 2},
    "--no-save-statistics": {"save_statistics": False},
    "--preset toyland": PRESETS["toyland"],
    "--preset character": PRESETS["character"],
}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["train", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(("option", "changed"), SET.items(), ids=SET)
def test_every_option_sets_one_setting(trained: list[TrainingConfig], option: str, changed: dict[str, Any]) -> None:
    photos = () if option.startswith(("--instance-data-dir", "--dataset-name")) else ("photos",)
    output = changed.get("output_dir", Path("potter"))
    wrote, _, *commands = run(*photos, *NEEDED, *option.split()).splitlines()
    assert wrote == f"Wrote the ED-LoRA of <{changed.get('concept', 'potter')}> to {output}"
    assert [line.split()[:2] for line in commands] == [["mixofshow", verb] for verb in ("sample", "evaluate", "fuse")]
    assert all(str(output) in line.split() for line in commands)
    (config,) = trained
    assert {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(USUAL, field.name)
    } == {name: value for name, value in changed.items() if value != getattr(USUAL, name)}


def test_lists_take_several_and_a_file_stands_below_the_options(trained: list[TrainingConfig], tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("seed = 3\nrank = 2\n")
    prompts = ("--instance-prompt", "a <TOK>", "--instance-prompt", "my <TOK>")
    told = json.loads(run("photos", *NEEDED, "--config", str(file), *prompts, "--rank", "8", "--json"))
    (config,) = trained
    assert (config.seed, config.rank, config.instance_prompt) == (3, 8, ("a <TOK>", "my <TOK>"))
    assert told == {
        "output": "potter", "concept": "<potter>", "class_word": "man", "settings": config.as_record(),
    }  # fmt: skip


def test_a_plan_is_of_the_settings_asked_for_and_tells_what_it_would_replace(
    trained: list[TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), colour).save(f"photos/{name}.png")
    Path("photos/masks").mkdir()
    Image.new("L", (64, 64), 255).save("photos/masks/a.png")
    Path("potter").mkdir()
    Path("potter/edlora.safetensors").touch()
    asked = ("photos", *NEEDED, "--base", "user/base", "--dry-run", "--json")
    sizes = ("--batch-size", "3", "--gradient-accumulation-steps", "2", "--steps", "5", "--embedding-phase-steps", "4")
    more = ("--resolution", "64", "--rank", "2", "--company", "0", "--instance-prompt", "a <TOK>")
    told = json.loads(run(*asked, *sizes, *more))
    assert told["base model"] == "user/base, from the Hub or its cache"
    misspelt = json.loads(run(*asked, "--base", "toylnd"))["base model"]
    assert misspelt == "toylnd, from the Hub or its cache. Did you mean 'toyland'?"
    assert told["concept"] == "<potter>, a man"
    assert told["photos"] == "2 with 1 different captions, 1 with a mask"
    assert told["method"] == "ed-lora, rank 2"
    assert told["steps"] == "9, each of 6 pictures at 64 pixels, photos repeated"
    assert told["time"].startswith("18 times that of one U-Net pass forward and backward ")
    assert told["writes"] == "potter"
    assert "edlora.safetensors; asks for --overwrite" in told["replaces"]
    allowed = json.loads(run(*asked, *sizes, *more, "--overwrite"))
    assert allowed == told | {"replaces": told["replaces"].removesuffix("; asks for --overwrite")}
    assert trained == []


def test_every_option_of_train_is_in_one_of_these_tests() -> None:
    alone = {"photos", "--config", "--dry-run", "--json", "--help-all"}
    alone |= {f"--{name.replace('_', '-')}" for name in RENAMED}  # tests/training/test_renamed.py
    tabled = named_in(*(tuple(option.split()) for option in SET))
    hidden = {each for each in options_of("train") if each.startswith("--no-")}
    switches = {f"--no-{each.removeprefix('--')}" for each in tabled} | {f"--{each[5:]}" for each in tabled & hidden}
    assert tabled | alone | (switches & options_of("train")) == options_of("train")


@pytest.mark.parametrize("switch", sorted(each for each in options_of("train") if each.startswith("--no-")))
def test_switches_are_turned_on_and_off_by_their_two_names(trained: list[TrainingConfig], switch: str) -> None:
    name = switch.removeprefix("--no-")
    needs = ("--attn-reg-weight", "0.2") if name == "reg-full-identity" else ()
    for option in (switch, f"--{name}"):
        run("photos", *NEEDED, option, *needs)
    assert [getattr(config, name.replace("-", "_")) for config in trained] == [False, True]
