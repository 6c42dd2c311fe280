"""A base that knows few words says which of a prompt it does not know, before it draws something else."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from cli.commands import run
from diffusers_mixofshow import Concept, toyland
from diffusers_mixofshow.errors import MixOfShowWarning
from diffusers_mixofshow.evaluation.prompts import HELD_OUT_PROMPTS, RECORDING_PROMPTS
from diffusers_mixofshow.sampling.vocabulary import warn_of_unknown_words
from diffusers_mixofshow.toyland.scenes import caption, random_scene, residents
from packs import random_pack


def test_strange_words_are_named_with_what_is_known() -> None:
    prompts = ["a Dog in front of a waterfall", "a <unicorn> in a hat, at night", "a hat"]
    with pytest.warns(MixOfShowWarning) as told:
        warn_of_unknown_words("Toyland", prompts)
    assert [str(one.message) for one in told] == [
        "toyland was never shown 'front', 'waterfall', 'hat', which it cannot draw. It knows critter, dog, cat, vase, "
        "chair, table, their colours, and these places: meadow, beach, desert, snow, night, room."
    ]


def test_no_caption_and_no_prompt_of_ours_has_a_strange_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(200):
            for things in (1, 2, 3):
                warn_of_unknown_words("toyland", [caption(random_scene(seed, things=things), seed)])
        warn_of_unknown_words("toyland", [*HELD_OUT_PROMPTS, *RECORDING_PROMPTS, *residents(), ""])
        warn_of_unknown_words("toyland", ["two critters and a dog in a meadow"])  # of which one at least is drawn
        warn_of_unknown_words("stable-diffusion-v1-5/stable-diffusion-v1-5", ["a waterfall"])


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_sampling_says_so(dry_run: tuple[str, ...], tmp_path: Path) -> None:
    asked = ("sample", "--base", "toyland", "--steps", "1", "--output", str(tmp_path / "x.png"), *dry_run)
    told = run(*asked, "--prompt", "a dog beside a waterfall")
    assert told.returncode == 0, told.stderr
    assert "toyland was never shown 'beside', 'waterfall'" in " ".join(told.stderr.split())
    assert "never shown" not in run(*asked, "--prompt", "a dog in the snow", "--overwrite").stderr


def test_a_concept_without_its_brackets_is_no_strange_word(tmp_path: Path) -> None:
    pack = random_pack(toyland.load_pipeline().components, Concept.from_name("Waldi", "dog"), base_model="toyland")
    pack.save_pretrained(tmp_path / "waldi")
    asked = ("sample", "--concepts", str(tmp_path / "waldi"), "--output", str(tmp_path / "x.png"), "--dry-run")
    told = run(*asked, "--prompt", "a waldi beside a dog").stderr
    assert "toyland was never shown 'beside', which" in " ".join(told.split())
