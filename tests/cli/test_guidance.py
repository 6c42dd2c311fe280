"""What the command line says beforehand, and when a name is misspelt."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import packs
from diffusers_mixofshow import EDLoRA, MixOfShowPipeline, cli, toyland
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, EDLoRANotFoundError


@pytest.fixture(scope="module")
def components():
    return toyland.load_pipeline().components


@pytest.fixture
def dog(components, tmp_path, monkeypatch):
    """A folder `dog` with an ED-LoRA of Toyland, in the folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    packs.random_pack(components, "dog", base_model="toyland").save_pretrained("dog")
    return EDLoRA.from_pretrained("dog")


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "--concepts", "dog", "--prompt", "a <dog>"),
        ("fuse", "dog", "--output", "pack"),
        ("evaluate", "dog"),
        ("compare", "dog"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_dry_run_tells_the_u_nets_runs_and_their_time(dog, arguments):
    told = run(*arguments, "--dry-run").stdout
    assert "U-Net runs: " in told
    assert "time: at least " in told
    assert "measured just now" in told


def test_a_dry_run_tells_sizes_and_photos_as_they_will_be(dog, tmp_path):
    own = run("sample", "--concepts", "dog", "--prompt", "a <dog>", "--dry-run").stdout
    assert "size: 64 x 64 pixels, the model's own\n" in own
    wide = run("sample", "--base", "user/base", "--prompt", "a dog", "--width", 64, "--dry-run").stdout
    assert "size: 64 x the model's own pixels\n" in wide
    rex = Concept.from_name("rex", "dog")
    rows = dict(zip(rex.tokens, dog.embeddings.values(), strict=True))
    replace(dog, concepts=(rex,), embeddings=rows).save_pretrained("rex")
    assert "photos: drawn of <rex>\n" in run("compare", "dog", "rex", "--dry-run").stdout


STRANGE = (
    "toyland was never shown 'hotdog', 'house', which it cannot draw. It knows critter, dog, cat, vase, chair, table, "
    "their colours, and these places: meadow, beach, desert, snow, night, room."
)
UNNAMED = "no prompt names <dog>, so that only weight updates act; write 'a <dog>'."


@pytest.mark.parametrize(
    ("prompt", "region", "told"),
    [
        ("a Dog in the meadow", None, ["the prompt says Dog; did you mean <dog>?"]),
        ("dog1 dog2 in the meadow", None, ["the prompt says dog1; did you mean <dog>?"]),
        ("a meadow", "0,0,0.5,1:a dog", ["the prompt says dog; did you mean <dog>?"]),
        ("a <dog> and a dog", None, []),
        ("a <dog1> <dog2> in the meadow", None, []),
        ("a hotdog, a dog_house", None, [UNNAMED, STRANGE]),
        ("a meadow", "0,0,0.5,1:a vase", [UNNAMED]),
        ("a dog", "0,0,0.5,1:a <dog>", []),
        ("a meadow", "0,0,0.5,1:a <dog>", []),
    ],
)
def test_a_concept_that_no_prompt_names_or_that_is_written_as_a_plain_word_is_warned_of(dog, prompt, region, told):
    more = ["--region", region] if region else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run("sample", "--concepts", "dog", "--prompt", prompt, *more, "--dry-run")
    assert [str(one.message) for one in caught] == told


def test_no_time_is_made_up_for_a_base_that_is_not_loaded(dog):
    told = run("sample", "--base", "user/base", "--prompt", "a dog", "--steps", 30, "--dry-run").stdout
    assert "time: 30 times that of one model pass" in told
    assert "not measured" in told


@pytest.mark.parametrize("arguments", [("inspect", "dgo"), ("push", "dgo"), ("fuse", "dog", "dgo", "--output", "x")])
def test_a_misspelt_folder_is_guessed(dog, arguments):
    with pytest.raises(EDLoRANotFoundError, match="Did you mean dog"):
        run(*arguments)


@pytest.mark.parametrize(
    ("base", "guess"), [("./toylnad", "'toyland'"), ("models/sd15x", "'models/sd15'"), ("./mdoels", "'models'")]
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_misspelt_folder_of_a_base_is_guessed(tmp_path, monkeypatch, base, guess, more):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=f"Did you mean {guess}.*no such folder"):
        run("sample", "--base", base, "--prompt", "a dog", *more)


def test_a_misspelt_concept_is_guessed(dog, tmp_path):
    with pytest.raises(ConfigurationError, match="Did you mean <dog>"):
        run("compare", "dog", "--photos", f"dgo={tmp_path}", "--dry-run")
    pipe = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)
    pipe.load_edlora(dog)
    with pytest.raises(ConceptError, match="Did you mean <dog>"):
        pipe.unload_edlora("<dgo>")
