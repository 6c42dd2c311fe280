"""Settings are checked as a whole, and every defect is named at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.training import TrainingConfig
from diffusers_mixofshow.training.presets import PRESETS
from diffusers_mixofshow.training.settings import settings_of


NEEDED = {"instance_data_dir": "photos", "concept": "potter", "class_word": "man"}


def test_defaults_are_the_papers() -> None:
    config = TrainingConfig(**NEEDED)
    assert (config.embedding_learning_rate, config.text_encoder_learning_rate, config.learning_rate) == (
        1e-3,
        1e-5,
        1e-4,
    )
    assert (config.rank, config.lora_alpha, config.noise_offset) == (4, 4, 0.01)


def test_concept_is_spelt_as_two_tokens() -> None:
    concept = TrainingConfig(**NEEDED, kind="character").concept_to_learn
    assert (concept.placeholder, concept.tokens) == ("<potter>", ("<potter1>", "<potter2>"))
    assert (concept.class_word, concept.kind) == ("man", "character")


def test_all_defects_are_in_one_error() -> None:
    wrong = {
        "rank": 0,
        "learning_rate": -1.0,
        "max_grad_norm": 0.0,
        "lr_scheduler": "step",
        "mixed_precision": "int8",
        "resolution": 500,
        "kind": "house",
    }
    with pytest.raises(ConfigurationError) as caught:
        TrainingConfig(**NEEDED, **wrong)
    for name, value in wrong.items():
        assert name in str(caught.value)
        assert str(value) in str(caught.value)


def test_a_smaller_batch_needs_no_other_number_of_captions() -> None:
    """At most so many: the embedded base's three are no more than the pictures there are."""
    assert TrainingConfig.toyland(**NEEDED, train_batch_size=2).captions_per_step == 3


def test_sheets_without_pictures_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="num_validation_images is 0, so no sheet would be drawn"):
        TrainingConfig.toyland(**NEEDED, output_dir="out", validation_steps=50, num_validation_images=0)


def test_wrong_types_are_named() -> None:
    with pytest.raises(ConfigurationError) as caught:
        TrainingConfig.from_mapping(NEEDED | {"rank": "4", "seed": True, "snr_gamma": [5], "masked_loss": 1})
    for expected in ("rank is '4', expected int", "seed is True", "snr_gamma is [5]", "masked_loss is 1"):
        assert expected in str(caught.value)
    assert TrainingConfig(**NEEDED, lora_alpha=4, snr_gamma=5).snr_gamma == 5


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="nothing would be learnt"):
        TrainingConfig(**NEEDED, embedding_learning_rate=0, text_encoder_learning_rate=0, learning_rate=0)


def test_embedding_phase_needs_a_rate() -> None:
    with pytest.raises(ConfigurationError, match="embedding_phase_steps"):
        TrainingConfig(**NEEDED, embedding_phase_steps=5, embedding_learning_rate=0)


def test_mapping_with_unknown_and_missing_names() -> None:
    with pytest.raises(ConfigurationError) as caught:
        TrainingConfig.from_mapping({"instance_data_dir": "photos", "lerning_rate": 1e-4, "colour": 1})
    message = str(caught.value)
    assert "'lerning_rate' (did you mean 'learning_rate'?)" in message
    assert "'colour'" in message
    assert "'concept' is missing" in message
    assert "'class_word' is missing" in message


def test_toyland_settings_can_be_replaced() -> None:
    config = TrainingConfig.toyland(**NEEDED, max_train_steps=3)
    assert (config.pretrained_model_name_or_path, config.resolution, config.max_train_steps) == ("toyland", 64, 3)
    assert TrainingConfig.toyland(**NEEDED).embedding_learning_rate > TrainingConfig(**NEEDED).embedding_learning_rate


def test_large_pictures_on_the_embedded_base_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"resolution is 512.*TrainingConfig\.toyland"):
        TrainingConfig(**NEEDED, pretrained_model_name_or_path="toyland", resolution=512)
    assert TrainingConfig(**NEEDED, pretrained_model_name_or_path="toyland", resolution=128).resolution == 128


@pytest.mark.parametrize("more", [{}, {"preset": "toyland"}, {"preset": "character"}])
def test_another_embedded_base_has_toylands_settings_at_its_own_size(more: dict[str, str]) -> None:
    config = TrainingConfig.from_mapping({**NEEDED, "pretrained_model_name_or_path": "toyland-xl", **more})
    assert (config.resolution, config.max_train_steps) == (96, PRESETS["toyland"]["max_train_steps"])
    assert TrainingConfig.toyland(**NEEDED, pretrained_model_name_or_path="Toyland-XL", resolution=64).resolution == 64
    with pytest.raises(ConfigurationError, match=r"resolution is 200.*draws pictures of 96 pixels"):
        TrainingConfig.toyland(**NEEDED, pretrained_model_name_or_path="toyland-xl", resolution=200)


def test_every_setting_is_documented() -> None:
    documentation = TrainingConfig.__doc__ or ""
    assert [f.name for f in dataclasses.fields(TrainingConfig) if f"\n        {f.name}: " not in documentation] == []


def test_record_is_json_without_private_folders() -> None:
    record = TrainingConfig(**NEEDED, output_dir="/home/someone/out").as_record()
    assert json.loads(json.dumps(record)) == record
    assert not {"instance_data_dir", "output_dir"} & record.keys()


def test_defects_of_names_and_values_are_in_one_error() -> None:
    wrong = {"concept": "potter", "colour": 1, "rank": 0, "resolution": "big", "preset": "best", "data": {"x": 1}}
    with pytest.raises(ConfigurationError) as caught:
        TrainingConfig.from_mapping(NEEDED | wrong)
    expected = ("unknown setting 'colour'", "unknown table 'data'", "rank is 0", "resolution is 'big'", "preset is")
    assert [text for text in expected if text not in str(caught.value)] == []


TOML = """
concept = "potter"
class_word = "man"
learning_rate = 1e-4
snr_gamma = 5
masked_loss = false
"""
YAML = """
concept: potter
class_word: man
learning_rate: 1e-4
snr_gamma: 5
masked_loss: no
mixed_precision: no
text_kv_learning_rate: null
"""


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML)])
def test_files_and_replacements(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    config = TrainingConfig.from_file(tmp_path / name, instance_data_dir="photos", concept="ginny")
    assert config == TrainingConfig(
        instance_data_dir="photos",
        concept="ginny",
        class_word="man",
        learning_rate=1e-4,
        snr_gamma=5,
        masked_loss=False,
    )


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.json", "{}", "ends in .toml, .yaml, .yml"),
        ("a.toml", "rank = ", "no valid TOML"),
        ("a.yaml", "rank: [", "no valid YAML"),
        ("a.yaml", "- rank", "no list of settings"),
        ("a.yaml", "rank: 4\nrank: 8", "rank more than once"),
        ("a.yaml", "rank: four", "rank is 'four', expected int"),
        ("a.yaml", "snr_gama: 4", "did you mean 'snr_gamma'"),
        ("a.toml", "snr_gama = 4", "did you mean 'snr_gamma'"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=complaint):
        TrainingConfig.from_file(tmp_path / name, **NEEDED)
    with pytest.raises(ConfigurationError, match="no readable configuration file"):
        TrainingConfig.from_file(tmp_path / "missing.toml")


def test_a_files_preset_lies_below_its_settings(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('preset = "toyland"\nrank = 8', encoding="utf-8")
    config = TrainingConfig.from_file(tmp_path / "a.toml", **NEEDED, max_train_steps=7)
    assert (config.pretrained_model_name_or_path, config.resolution, config.max_train_steps) == ("toyland", 64, 7)
    assert (config.rank, config.lora_alpha) == (8, 8)


def test_a_record_makes_the_same_config() -> None:
    config = TrainingConfig.toyland(**NEEDED, rank=8, lora_alpha=4)
    assert TrainingConfig.from_mapping(config.as_record() | {"instance_data_dir": "photos"}) == config


@dataclasses.dataclass
class Example:
    """Of settings.

    Args:
        names: Several ``names``,
            on two lines.
        share: A number.
        place: Where.

    Raises:
        Nothing: Ever.
    """

    names: tuple[str, ...] = ()
    share: float | None = None
    place: str | Path = "here"


def test_fields_say_what_they_are() -> None:
    names, share, place = settings_of(Example).values()
    assert (names.option, names.documentation) == ("--names", "Several ``names``, on two lines.")
    assert (names.from_text(["a", "b"]), names.from_text("a"), share.from_text("None")) == (("a", "b"), ("a",), None)
    assert (share.from_text("1e-3"), share.from_text("x"), share.accepts(1), share.accepts(True)) == (
        1e-3,
        "x",
        True,
        False,
    )
    assert (place.expected, share.expected, names.accepts(("a", 1))) == ("str | Path", "float | None", False)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_changes_only_settings(name: str) -> None:
    config = TrainingConfig.from_mapping(NEEDED | {"preset": name})
    assert {setting: getattr(config, setting) for setting in PRESETS[name]} == PRESETS[name]


def test_presets_of_kinds_fit_the_embedded_base_and_others_do_not() -> None:
    on_toyland = NEEDED | {"pretrained_model_name_or_path": "toyland"}
    config = TrainingConfig.from_mapping(on_toyland | {"preset": "character"})
    assert (config.kind, config.random_flip, config.resolution) == ("character", False, 64)
    with pytest.raises(ConfigurationError, match="embedded base brings its own"):
        TrainingConfig.from_mapping(on_toyland | {"preset": "paper"})


def test_photos_come_from_a_folder_or_the_hub() -> None:
    with pytest.raises(ConfigurationError, match="one of instance_data_dir and dataset_name"):
        TrainingConfig(concept="potter", class_word="man")
    with pytest.raises(ConfigurationError, match="one of instance_data_dir and dataset_name"):
        TrainingConfig(**NEEDED, dataset_name="me/photos")


def test_data_settings_that_contradict() -> None:
    with pytest.raises(ConfigurationError) as caught:
        TrainingConfig.from_mapping(
            NEEDED
            | {"framing": "place", "center_crop": True, "proportion_empty_prompts": 1.5, "captions_per_step": 1}
            | {"instance_prompt": []}
        )
    for expected in (
        "center_crop is set but",
        "1.5, expected less than 1",
        "single caption",
        "instance_prompt is empty",
    ):
        assert expected in str(caught.value)


def test_one_text_is_a_list_of_one() -> None:
    assert TrainingConfig.from_mapping(NEEDED | {"instance_prompt": "my <TOK>"}).instance_prompt == ("my <TOK>",)


def test_captions_of_photos_without_any_name_the_concept() -> None:
    with pytest.raises(ConfigurationError, match="'a man', which does not name the concept; write <TOK> or <potter>"):
        TrainingConfig(**NEEDED, instance_prompt=("a man", "a <potter>"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_grad_norm": float("inf")}, "max_grad_norm is inf, expected a finite number"),
        ({"snr_gamma": float("inf")}, "snr_gamma is inf, expected a finite number"),
        ({"seed": 2**63}, r"seed is 9223372036854775808, expected below 2\*\*63"),
        ({"preset": ["fast"]}, r"preset is \['fast'\], expected one of"),
        ({"class_prompt": "a photo of a <TOK>"}, "class_prompt 'a photo of a <TOK>' names the concept"),
        ({"class_prompt": "a <potter>"}, "class_prompt 'a <potter>' names the concept"),
        (
            {"method": "custom-diffusion", "learning_rate": 0, "embedding_learning_rate": 0},
            "custom-diffusion learns embeddings and the U-Net's text keys and values, but",
        ),
    ],
)
def test_what_would_fail_late_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        TrainingConfig.from_mapping(NEEDED | settings)


def test_numbers_of_numpy_become_pythons() -> None:
    config = TrainingConfig(
        **NEEDED, learning_rate=np.float32(0.5), lora_alpha=np.int64(4), noise_offset=np.float64(1)
    )
    assert json.dumps(config.as_record())
    kinds = {type(value) for value in (config.learning_rate, config.lora_alpha, config.noise_offset)}
    assert kinds == {float}
    assert type(TrainingConfig(**NEEDED, lora_alpha=4).lora_alpha) is int  # as it is in records of today


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", f"rank = {'[' * 3000}"),
        ("a.toml", f"rank = {'1' * 5000}"),
        ("a.yaml", f"rank: {'[' * 3000}"),
    ],
)
def test_files_that_no_parser_takes_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigurationError, match="is no valid"):
        TrainingConfig.from_file(tmp_path / name)
