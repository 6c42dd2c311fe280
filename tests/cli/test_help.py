"""What `--help` says of the options: each has a sentence and its place, and defaults stand where they are used."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from cli.commands import VERBS
from diffusers_mixofshow import MixOfShowPipeline, cli, toyland
from diffusers_mixofshow.fusion.solving import Settings
from diffusers_mixofshow.sampling.control import ADAPTERS, CONTROLNETS
from diffusers_mixofshow.sampling.loading import load_base
from diffusers_mixofshow.training import TrainingConfig
from diffusers_mixofshow.training.renamed import RENAMED


COMMANDS = get_command(cli.app).commands


def test_the_verbs_stand_in_the_order_of_the_work() -> None:
    assert tuple(COMMANDS) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_sentence(verb: str) -> None:
    hidden = {each.name for each in COMMANDS[verb].params if getattr(each, "hidden", False)}
    switches_off = {each.name for each in COMMANDS[verb].params if verb == "train" and each.name.startswith("no_")}
    assert hidden == switches_off | (RENAMED.keys() if verb == "train" else set())
    silent = [each.name for each in COMMANDS[verb].params if each.name not in switches_off and not each.help]
    assert silent == []


def test_fuse_tells_the_default_ridge() -> None:
    (told,) = (each.help for each in COMMANDS["fuse"].params if each.name == "ridge")
    own, in_stages = (Settings(in_stages=staged).ridge_of(1) for staged in (False, True))
    most = round(Settings().ridge_of(10**6) / own)
    assert told.endswith(
        f"(default: for each input feature of a layer {own:.1e}, sequential {in_stages:.1e}; "
        f"more than {most} features count as {most}).".replace("e-0", "e-")
    )


def panels(verb: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for each in COMMANDS[verb].params:
        if not getattr(each, "hidden", False):
            found.setdefault(getattr(each, "rich_help_panel", None) or "", []).append(each.name)
    return found


def test_options_of_sample_stand_in_their_groups() -> None:
    assert panels("sample") == {
        "": ["prompt", "concepts", "base", "negative_prompt", "overwrite", "dry_run"],
        "Regions": [
            "region", "layout", "isolation", "isolation_steps", "isolation_scales", "draft", "refine",
        ],
        "Pictures to start from and to follow": ["image", "mask", "strength", "control", "adapter", "control_scale"],
        "Settings": ["seed", "steps", "guidance", "lora_scale", "width", "height", "device", "dtype"],
        "Result": ["output", "count", "as_json"],
    }  # fmt: skip


def test_options_of_train_stand_in_their_groups() -> None:
    assert {panel: (names[0], names[-1]) for panel, names in panels("train").items()} == {
        "": ("photos", "help_all"),
        "What to learn": ("instance_data_dir", "seed"),
        "Pictures and captions": ("resolution", "proportion_empty_prompts"),
        "Steps": ("train_batch_size", "embedding_phase_steps"),
        "Learning rates": ("embedding_learning_rate", "max_grad_norm"),
        "LoRA and loss": ("rank", "mixed_precision"),
        "Method and optimiser": ("method", "embedding_norm_threshold"),
        "Regularisers": ("attn_reg_weight", "prior_loss_weight"),
        "Memory and speed": ("gradient_checkpointing", "torch_compile"),
        "Checkpoints": ("checkpointing_steps", "resume_from_checkpoint"),
        "What is seen and kept": ("report_to", "save_statistics"),
    }


def options_shown(option: str, columns: int) -> list[str]:
    """The first spelling of each option in a help of train, in its order."""
    result = CliRunner().invoke(cli.app, ["train", option], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    return re.findall(r"^. (--[\w-]+)", result.output, re.MULTILINE)


def test_the_help_of_train_shows_what_is_used_daily() -> None:
    assert options_shown("--help", 80) == [
        *("--preset", "--config", "--dry-run", "--json", "--help-all", "--help"),
        *("--instance-data-dir", "--dataset-name", "--concept", "--class-word", "--kind", "--base"),
        *("--output", "--overwrite", "--seed", "--resolution", "--instance-prompt", "--batch-size", "--steps"),
        *("--masked-loss", "--mixed-precision", "--gradient-checkpointing", "--checkpointing-steps"),
        *("--resume-from-checkpoint", "--validation-prompt"),
    ]


def test_the_whole_help_of_train_shows_every_option_and_the_short_one_tells_of_it() -> None:
    advertised = [each.opts[0] for each in COMMANDS["train"].params if not getattr(each, "hidden", False)]
    assert sorted(options_shown("--help-all", 80)) == sorted([*advertised[1:], "--help"])  # the first is PHOTOS
    count = len(dataclasses.fields(TrainingConfig))
    told = CliRunner().invoke(cli.app, ["train", "--help"], env={"COLUMNS": "80"}).output.splitlines()
    assert [f"Show all {count} settings and exit." in line for line in told if "--help-all" in line] == [True]


@pytest.mark.parametrize("before", ["", "--help-all "])
def test_shell_completion_offers_what_the_short_help_leaves_out(before: str) -> None:
    words = f"mixofshow train {before}--lr"
    asked = {"_MIXOFSHOW_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    offered = CliRunner().invoke(cli.app, [], prog_name="mixofshow", env=asked).output.split()
    assert offered == ["--lr-scheduler", "--lr-warmup-steps", "--lr-num-cycles", "--lr-power"]


@pytest.mark.parametrize(
    ("name", "ends", "metavar"),
    [
        ("concept", "either way. (required)", "<str>"),
        ("pretrained_model_name_or_path", "(default: stable-diffusion-v1-5/stable-diffusion-v1-5)", "<str>"),
        ("center_crop", "(reference). (default: no)", " "),
        ("masked_loss", "(default: yes; toyland: no; off: --no-masked-loss)", " "),
        ("max_train_steps", "(default: 800; toyland: 200)", "<int>"),
        ("snr_gamma", "None: equal weights (paper).", "<float>"),
        ("learning_rate", "(default: 0.0001; toyland: 0.0007)", "<float>"),
        ("output_dir", "", "<path>"),
        (
            "lr_scheduler",
            "linear decay to 0 (reference), cosine, cosine_with_restarts, polynomial, constant or "
            "constant_with_warmup. "
            "(default: linear)",
            "<str>",
        ),
        ("kind", "One of character, pet, object, scene. (default: object)", "<str>"),
        (
            "instance_prompt",
            "Several: repeat the option. (default: 'a photo of a <TOK>', 'a picture of a <TOK>', "
            "'a close-up photo of a <TOK>', 'a good photo of a <TOK>', 'a rendition of a <TOK>')",
            "<str>",
        ),
    ],
)
def test_the_help_of_train_tells_defaults(name: str, ends: str, metavar: str) -> None:
    (parameter,) = (each for each in COMMANDS["train"].params if each.name == name)
    assert parameter.help.endswith(ends)
    assert parameter.metavar == metavar
    assert "`" not in parameter.help


SHORT = {
    "pretrained_model_name_or_path": ["--base", "--pretrained-model-name-or-path"],
    "output_dir": ["--output", "--output-dir"],
    "max_train_steps": ["--steps", "--max-train-steps"],
    "train_batch_size": ["--batch-size", "--train-batch-size"],
    "rank": ["--rank"],
}


@pytest.mark.parametrize(("name", "spellings"), SHORT.items())
def test_short_names_of_train(name: str, spellings: list[str]) -> None:
    assert [each.opts for each in COMMANDS["train"].params if each.name == name] == [spellings]


def test_the_models_that_are_known_for_detectors() -> None:
    """By the names that their makers gave them; none of them can be looked up here."""
    assert CONTROLNETS == {
        name: f"lllyasviel/control_{model}"
        for name, model in {
            "canny": "v11p_sd15_canny", "depth_midas": "v11f1p_sd15_depth", "lineart_realistic": "v11p_sd15_lineart",
            "mlsd": "v11p_sd15_mlsd", "normal_bae": "v11p_sd15_normalbae", "openpose": "v11p_sd15_openpose",
            "scribble_hed": "v11p_sd15_scribble", "softedge_hed": "v11p_sd15_softedge",
        }.items()
    }  # fmt: skip
    assert ADAPTERS == {
        name: f"TencentARC/t2iadapter_{model}"
        for name, model in {
            "canny": "canny_sd15v2", "depth_midas": "depth_sd15v2", "openpose": "openpose_sd14v1",
            "scribble_pidinet": "sketch_sd15v2",
        }.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("base", "has_gpu", "device", "dtype", "expected"),
    [
        ("base", False, None, None, ("cpu", torch.float32)),
        ("base", True, None, None, ("cuda", torch.float16)),
        ("base", True, "cuda:1", None, ("cuda:1", torch.float16)),
        ("base", True, "cpu", None, ("cpu", torch.float32)),
        ("base", True, None, "bfloat16", ("cuda", torch.bfloat16)),
        ("base", False, None, "float16", ("cpu", torch.float16)),
        ("toyland", False, None, None, ("cpu", torch.float32)),
        ("toyland", True, None, None, ("cuda", torch.float32)),
        ("toyland", True, "cuda", "float16", ("cuda", torch.float16)),
    ],
)
def test_where_and_in_which_numbers_a_base_is_loaded(
    tmp_path, monkeypatch, base, has_gpu, device, dtype, expected
) -> None:
    """No GPU is needed: what would be moved there says so."""
    zeros, loaded = torch.zeros, []

    class Loaded:
        def to(self, where: str) -> Loaded:
            loaded.append(where)
            return self

        def set_progress_bar_config(self, **shown: object) -> None:
            assert shown["desc"] == "Sampling"

    def load(*place: object, dtype: torch.dtype, **options: object) -> Loaded:
        loaded.append(dtype)
        return Loaded()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **more: zeros(*size, **more))
    monkeypatch.setattr(MixOfShowPipeline, "from_pretrained", load)
    monkeypatch.setattr(toyland, "load_pipeline", load)
    load_base(base, device, dtype)
    assert tuple(reversed(loaded)) == expected
