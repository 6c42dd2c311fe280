"""Every setting has the default, the limits and the choices that it promises, and every preset its values."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.training import TrainingConfig
from diffusers_mixofshow.training.captions import TEMPLATES
from diffusers_mixofshow.training.presets import PRESETS


NEEDED = {"instance_data_dir": "photos", "concept": "potter", "class_word": "man"}
DEFAULTS = {
    "dataset_name": None,
    "kind": "object",
    "pretrained_model_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "output_dir": None,
    "overwrite": False,
    "seed": 0,
    "resolution": 512,
    "center_crop": False,
    "crop_variants": 4,
    "framing": "crop",
    "latents_dir": None,
    "random_flip": False,
    "caption_column": "text",
    "instance_prompt": (
        "a photo of a <TOK>",
        "a picture of a <TOK>",
        "a close-up photo of a <TOK>",
        "a good photo of a <TOK>",
        "a rendition of a <TOK>",
    ),
    "company": 0.4,
    "tag_shuffles": 0,
    "proportion_empty_prompts": 0.0,
    "train_batch_size": 4,
    "captions_per_step": None,
    "max_train_steps": 800,
    "embedding_phase_steps": 0,
    "embedding_learning_rate": 1e-3,
    "text_encoder_learning_rate": 1e-5,
    "learning_rate": 1e-4,
    "text_kv_learning_rate": None,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 0,
    "adam_weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "rank": 4,
    "lora_alpha": 4.0,
    "keep_start_token": True,
    "noise_offset": 0.01,
    "snr_gamma": None,
    "masked_loss": True,
    "initializer_std": 0.013,
    "mixed_precision": "no",
    "method": "ed-lora",
    "optimizer": "AdamW",
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "gradient_accumulation_steps": 1,
    "ema_decay": None,
    "embedding_norm_threshold": None,
    "attn_reg_weight": 0.0,
    "reg_full_identity": False,
    "class_data_dir": None,
    "class_prompt": None,
    "num_class_images": 100,
    "prior_loss_weight": 1.0,
    "gradient_checkpointing": False,
    "torch_compile": False,
    "checkpointing_steps": 250,
    "checkpoints_total_limit": 2,
    "resume_from_checkpoint": None,
    "report_to": None,
    "validation_prompt": "a photo of a <TOK>",
    "validation_steps": None,
    "num_validation_images": 4,
    "save_statistics": True,
}
PAPER = {
    "resolution": 512,
    "framing": "place",
    "random_flip": False,
    "company": 0.0,
    "tag_shuffles": 8,
    "train_batch_size": 4,
    "captions_per_step": None,
    "max_train_steps": 800,
    "embedding_phase_steps": 0,
    "embedding_learning_rate": 1e-3,
    "text_encoder_learning_rate": 1e-5,
    "learning_rate": 1e-4,
    "text_kv_learning_rate": None,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 0,
    "adam_weight_decay": 0.01,
    "rank": 4,
    "lora_alpha": 4.0,
    "keep_start_token": False,
    "noise_offset": 0.01,
    "snr_gamma": None,
    "masked_loss": True,
    "initializer_std": 0.013,
    "method": "ed-lora",
    "optimizer": "AdamW",
    "gradient_accumulation_steps": 1,
    "ema_decay": None,
    "embedding_norm_threshold": 0.55,
    "attn_reg_weight": 0.01,
    "reg_full_identity": False,
    "class_data_dir": None,
}
OTHERS = {
    "toyland": {
        "pretrained_model_name_or_path": "toyland",
        "resolution": 64,
        "crop_variants": 1,
        "train_batch_size": 12,
        "captions_per_step": 3,
        "max_train_steps": 200,
        "embedding_phase_steps": 200,
        "embedding_learning_rate": 5e-3,
        "text_encoder_learning_rate": 1e-3,
        "learning_rate": 7e-4,
        "masked_loss": False,
        "lr_warmup_steps": 10,
        "checkpointing_steps": None,
        "save_statistics": False,
    },
    "character": {"kind": "character", "framing": "place", "random_flip": False, "tag_shuffles": 8},
    "object": {"kind": "object", "framing": "crop", "random_flip": True, "tag_shuffles": 8},
    "scene": {"kind": "scene", "framing": "buckets", "masked_loss": False, "tag_shuffles": 8},
    "fast": {
        "max_train_steps": 400,
        "captions_per_step": 1,
        "embedding_learning_rate": 2e-3,
        "text_encoder_learning_rate": 2e-5,
        "learning_rate": 2e-4,
        "lr_warmup_steps": 20,
    },
    "low-memory": {
        "train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "mixed_precision": "fp16",
    },
}


def made(**settings: Any) -> TrainingConfig:
    return TrainingConfig(**{**NEEDED, **settings})


def refusal(**settings: Any) -> str:
    """What a config with these settings is refused with; empty if it is not."""
    try:
        made(**settings)
    except ConfigurationError as error:
        return str(error)
    return ""


def test_every_default_is_the_one_promised() -> None:
    config = made()
    assert {each.name: getattr(config, each.name) for each in fields(config) if each.name not in NEEDED} == DEFAULTS
    assert DEFAULTS["instance_prompt"] == TEMPLATES


def test_every_preset_is_the_one_promised() -> None:
    assert PRESETS == {"paper": PAPER, **OTHERS}


BESIDE: dict[str, dict[str, Any]] = {
    "num_validation_images": {"validation_steps": None},
    "validation_steps": {"output_dir": "out"},
    "embedding_learning_rate": {"embedding_phase_steps": 0},
}
"""What a setting's smallest value needs beside it."""


@pytest.mark.parametrize(
    ("names", "smallest", "refused", "expected"),
    [
        (
            (
                *("train_batch_size", "max_train_steps", "captions_per_step", "crop_variants", "rank"),
                *("gradient_accumulation_steps", "checkpointing_steps", "checkpoints_total_limit"),
                *("validation_steps", "num_class_images", "lr_num_cycles"),
            ),
            1,
            0,
            "at least 1",
        ),
        (
            (
                *(
                    "embedding_learning_rate",
                    "text_encoder_learning_rate",
                    "learning_rate",
                    "text_kv_learning_rate",
                    "company",
                ),
                *("proportion_empty_prompts", "adam_weight_decay", "noise_offset", "initializer_std"),
                *("attn_reg_weight", "prior_loss_weight"),
            ),
            0.0,
            -0.01,
            "0 or more",
        ),
        (
            ("tag_shuffles", "embedding_phase_steps", "lr_warmup_steps", "seed", "num_validation_images"),
            0,
            -1,
            "0 or more",
        ),
        (
            ("lora_alpha", "max_grad_norm", "snr_gamma", "embedding_norm_threshold", "lr_power"),
            0.01,
            0.0,
            "above 0",
        ),
    ],
)
def test_the_smallest_value_is_taken_and_what_is_below_is_not(
    names: tuple[str, ...], smallest: float, refused: float, expected: str
) -> None:
    for name in names:
        beside = BESIDE.get(name, {})
        assert getattr(made(**{**beside, name: smallest}), name) == smallest
        assert f"{name} is {refused}, expected {expected}" in refusal(**{**beside, name: refused})


@pytest.mark.parametrize("resolution", [0, -8])
def test_a_resolution_below_one_is_refused(resolution: int) -> None:
    assert f"resolution is {resolution}, expected at least 1" in refusal(resolution=resolution)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("framing", ("crop", "place", "buckets")),
        (
            "lr_scheduler",
            ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
        ),
        ("mixed_precision", ("no", "fp16", "bf16")),
        (
            "method",
            (
                *("ed-lora", "ed-lora-shared-layers", "ed-lora-without-class", "lora", "textual-inversion"),
                *("p-plus", "custom-diffusion"),
            ),
        ),
        ("report_to", ("tensorboard", "wandb")),
    ],
)
def test_choices_are_those_that_are_documented(name: str, values: tuple[str, ...]) -> None:
    for value in values:
        assert getattr(made(**{name: value}, output_dir="out"), name) == value
    assert f"{name} is 'other', expected one of {', '.join(values)}" in refusal(**{name: "other"}, output_dir="out")


@pytest.mark.parametrize(
    ("contradiction", "words", "mended"),
    [
        (
            {"embedding_learning_rate": 0.0, "text_encoder_learning_rate": 0.0, "learning_rate": 0.0},
            "all learning rates are 0",
            {"text_kv_learning_rate": 1e-4},
        ),
        (
            {"embedding_phase_steps": 5, "embedding_learning_rate": 0.0},
            "embedding_phase_steps is set but",
            {"embedding_phase_steps": 0},
        ),
        ({"class_data_dir": "men", "framing": "buckets"}, "pictures of the class are square", {"framing": "place"}),
        ({"center_crop": True, "framing": "place"}, "which crops nothing", {"framing": "buckets"}),
        ({"instance_prompt": ()}, "instance_prompt is empty", {"instance_prompt": ("<TOK>",)}),
        ({"company": 1.0}, "company is 1.0, expected less than 1", {"company": 0.99}),
        (
            {"proportion_empty_prompts": 1.0},
            "proportion_empty_prompts is 1.0, expected less than 1",
            {"proportion_empty_prompts": 0.99},
        ),
        (
            {"proportion_empty_prompts": 0.1, "captions_per_step": 1},
            "a step has a single caption",
            {"captions_per_step": 2},
        ),
        (
            {"proportion_empty_prompts": 0.1, "train_batch_size": 1},
            "a step has a single caption",
            {"train_batch_size": 2},
        ),
        ({"resolution": 500}, "resolution is 500, expected a multiple of 8", {"resolution": 504}),
        (
            {"pretrained_model_name_or_path": "toyland", "resolution": 136},
            "the embedded base draws pictures of 64 pixels",
            {"resolution": 128},
        ),
        (
            {"method": "textual-inversion", "embedding_learning_rate": 0.0},
            "textual-inversion learns embeddings alone",
            {"method": "lora"},
        ),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, expected a number between 0 and 1", {"ema_decay": 0.999}),
        ({"ema_decay": 0.0}, "ema_decay is 0.0, expected a number between 0 and 1", {"ema_decay": 0.001}),
        (
            {
                "optimizer": "Prodigy",
                "embedding_learning_rate": 1.0,
                "text_encoder_learning_rate": 0.0,
                "learning_rate": 0.5,
            },
            "Prodigy finds its own rates",
            {"learning_rate": 1.0},
        ),
        (
            {
                "optimizer": "prodigy",
                "embedding_learning_rate": 1.0,
                "text_encoder_learning_rate": 1.0,
                "learning_rate": 1.0,
                "text_kv_learning_rate": 2.0,
            },
            "Prodigy finds its own rates",
            {"text_kv_learning_rate": None},
        ),
        ({"reg_full_identity": True}, "attn_reg_weight is 0", {"attn_reg_weight": 0.01}),
        (
            {"torch_compile": True, "attn_reg_weight": 0.01},
            "torch_compile does not let the attention be recorded",
            {"attn_reg_weight": 0.0},
        ),
        ({"validation_prompt": "a man"}, "does not name the concept, <TOK>", {"validation_prompt": "a <TOK>"}),
        (
            {"output_dir": "out", "validation_steps": 5, "num_validation_images": 0},
            "no sheet would be drawn",
            {"num_validation_images": 1},
        ),
        ({"validation_steps": 5}, "validation_steps is set but output_dir is not", {"output_dir": "out"}),
        ({"report_to": "wandb"}, "report_to is set but output_dir is not", {"output_dir": "out"}),
        (
            {"resume_from_checkpoint": "latest"},
            "resume_from_checkpoint is set but output_dir is not",
            {"output_dir": "out"},
        ),
        ({"concept": "<potter"}, "which has one bracket", {"concept": "<potter>"}),
        (
            {"instance_prompt": ("a <TOK>", "a man")},
            "'a man', which does not name",
            {"instance_prompt": ("<potter>",)},
        ),
    ],
)
def test_what_contradicts_is_refused_until_it_is_mended(
    contradiction: dict[str, Any], words: str, mended: dict[str, Any]
) -> None:
    told = refusal(**contradiction)
    assert words in told
    assert told.startswith("Training cannot start with these settings: ")
    assert refusal(**{**contradiction, **mended}) == ""


def test_a_contradiction_is_one_defect() -> None:
    """None is told besides that is not there."""
    assert refusal(reg_full_identity=True) == (
        "Training cannot start with these settings: reg_full_identity is set but attn_reg_weight is 0"
    )


UNRECORDED = {
    *("instance_data_dir", "dataset_name", "output_dir", "latents_dir", "class_data_dir", "resume_from_checkpoint"),
    "overwrite",
}
FREE = {
    *("checkpointing_steps", "checkpoints_total_limit", "report_to", "validation_prompt", "validation_steps"),
    *("num_validation_images", "save_statistics"),
}


def test_records_leave_out_folders_and_identities_what_changes_nothing() -> None:
    config = made(snr_gamma=5)
    names = {each.name for each in fields(config)}
    assert config.as_record().keys() == names - UNRECORDED
    assert config.as_identity().keys() == names - UNRECORDED - FREE
    assert config.as_record()["instance_prompt"] == list(TEMPLATES)
    assert (config.as_record()["snr_gamma"], config.as_identity()["snr_gamma"]) == (5, 5)


def test_alpha_goes_with_the_rank_and_a_preset_lies_above_the_embedded_bases_settings() -> None:
    def of(**settings: Any) -> TrainingConfig:
        return TrainingConfig.from_mapping(NEEDED | settings)

    assert (of(rank=8).lora_alpha, of(rank=8, lora_alpha=2.0).lora_alpha, of(lora_alpha=2.0).rank) == (8.0, 2.0, 4)
    assert (of(rank=1).lora_alpha, of(preset="fast", learning_rate=1.0).learning_rate) == (1.0, 1.0)
    scene = of(preset="scene", pretrained_model_name_or_path="Toyland")
    assert (scene.framing, scene.resolution, scene.pretrained_model_name_or_path) == ("buckets", 64, "toyland")
    for preset in ("paper", "fast", "low-memory"):
        with pytest.raises(ConfigurationError, match=f"preset is '{preset}', which has Stable Diffusion's rates"):
            of(preset=preset, pretrained_model_name_or_path="toyland")
    for preset in ("toyland", "character", "object", "scene"):
        of(preset=preset, pretrained_model_name_or_path="toyland")


def test_steps_of_both_phases_are_the_total() -> None:
    assert made(embedding_phase_steps=3, max_train_steps=5).total_steps == 8


@pytest.mark.parametrize(
    ("method", "tokens"),
    [("ed-lora", 2), ("ed-lora-shared-layers", 2), ("ed-lora-without-class", 1), ("lora", 1), ("custom-diffusion", 2)],
)
def test_a_method_spells_the_concept_with_its_tokens(method: str, tokens: int) -> None:
    assert made(method=method).concept_to_learn.tokens == ("<potter1>", "<potter2>")[:tokens]
