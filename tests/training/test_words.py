"""Names that the tokenizer knows already are refused; class words that it does not know are told."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

import tiny
from diffusers_mixofshow import toyland
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, MixOfShowWarning
from diffusers_mixofshow.training import EDLoRATrainer, TrainingConfig
from diffusers_mixofshow.training.words import check_words


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """That of the embedded base, whose words are those of its drawn world."""
    return CLIPTokenizer.from_pretrained(toyland.path() / "tokenizer")


@pytest.mark.parametrize("class_word", ["critter", "dog", "Vase"])
def test_a_word_of_the_base_is_fine(tokenizer: PreTrainedTokenizerBase, class_word: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_words(Concept.from_name("bobo", class_word), tokenizer)


def test_several_words_are_averaged(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.warns(
        MixOfShowWarning, match=r"'red dog' is 2 tokens of the base \(red \+ dog\); <bobo2> starts from"
    ):
        check_words(Concept.from_name("bobo", "red dog"), tokenizer)


def test_an_unknown_word_falls_into_pieces(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.warns(MixOfShowWarning, match="no word that the base knows") as caught:
        check_words(Concept.from_name("bobo", "criter"), tokenizer)
    assert "critter" in str(caught[0].message)


def test_only_the_unknown_one_of_several_words_is_blamed(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.warns(
        MixOfShowWarning,
        match=r"so 'criter' is no word that the base knows.*Similar words that the base knows: critter",
    ):
        check_words(Concept.from_name("bobo", "red criter"), tokenizer)


def test_names_that_are_taken_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens(["<bobo>", "<bobo2>"])
    with pytest.raises(ConceptError, match="<bobo>, <bobo2> is already a word"):
        check_words(Concept.from_name("bobo", "dog"), tokenizer)


def test_the_trainer_looks_before_it_trains(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    pipeline = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    pipeline.tokenizer.add_tokens(["<potter1>"])
    config = TrainingConfig(instance_data_dir=tmp_path, concept="potter", class_word="man", resolution=32)
    with pytest.raises(ConceptError, match="<potter1> is already"):
        EDLoRATrainer(config, pipeline).train()


@pytest.mark.parametrize("name", ["<potter", "potter>"])
def test_one_bracket_is_a_slip(name: str) -> None:
    with pytest.raises(ConfigurationError, match="one bracket"):
        TrainingConfig(instance_data_dir="photos", concept=name, class_word="man")
