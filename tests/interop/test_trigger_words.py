"""Trigger words that a file's metadata tells: found, used where nobody gives prompts, and never taken on trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import packs
import tiny
from diffusers_mixofshow import GradientFuser, LoRASource, MixOfShowPipeline, cli
from diffusers_mixofshow.errors import ConfigurationError, FusionError, MixOfShowWarning
from diffusers_mixofshow.interop.lora_files import write_lora
from diffusers_mixofshow.interop.trigger_words import find_trigger_words


KOHYA = {"ss_dataset_dirs": json.dumps({"10_sks dog": {"n_repeats": 10, "img_count": 12}, "5_sks dog": {}, "reg": {}})}
AI_TOOLKIT = {"ss_tag_frequency": json.dumps({"1_ohwx man": {"ohwx man": 1}})}
STANDARD = {"modelspec.trigger_phrase": "sks dog"}


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({}, ()),
        (KOHYA, ("sks dog",)),
        (AI_TOOLKIT, ("ohwx man",)),
        (STANDARD, ("sks dog",)),
        (STANDARD | AI_TOOLKIT, ("sks dog", "ohwx man")),
        (STANDARD | KOHYA, ("sks dog",)),
        ({"modelspec.trigger_phrase": " sks \n dog "}, ("sks dog",)),
        ({"modelspec.trigger_phrase": "sks \x1b[31m dog"}, ()),
        ({"modelspec.trigger_phrase": "x" * 101}, ()),
        ({"ss_dataset_dirs": "{'10_sks dog': 1}"}, ()),
        ({"ss_dataset_dirs": "[" * 100_000}, ()),
        ({"ss_dataset_dirs": '["10_sks dog"]'}, ()),
        ({"ss_dataset_dirs": '{"10_": {}, "photos": {}, "_x": {}}'}, ()),
    ],
)
def test_what_files_tell(metadata: dict[str, str], found: tuple[str, ...]) -> None:
    assert find_trigger_words(metadata) == found


@pytest.fixture(scope="module")
def pipe() -> MixOfShowPipeline:
    pipe = MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _write(pipe: Any, path: Path, metadata: dict[str, str], seed: int = 0) -> Path:
    return write_lora(path, packs.random_pack(pipe.components, "rex", ranks=(1,), seed=seed).lora, metadata)


def test_a_lora_that_tells_them_needs_no_prompts(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    dog = _write(pipe, tmp_path / "dog.safetensors", KOHYA)
    fuser = GradientFuser(pipe, steps=1, statistics=tmp_path / "kept")
    with pytest.warns(MixOfShowWarning, match=r"dog is recorded with prompts made of .* 'sks dog': a photo"):
        told = fuser.fuse([dog])
    prompts = told.report.data["prompts"]["dog"]
    assert len(prompts) > 2
    assert all("sks dog" in prompt for prompt in prompts)
    given = fuser.fuse([LoRASource(dog, prompts)])  # no warning, which would be an error
    for site, update in told.lora.items():
        assert torch.equal(update.down, given.lora[site].down)


def test_a_lora_that_tells_none_still_needs_them(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    silent = _write(pipe, tmp_path / "silent.safetensors", {})
    for given in (silent, LoRASource(silent)):
        with pytest.raises(FusionError, match=r"plain LoRA, which acts by its trigger words, and its file names none"):
            GradientFuser(pipe).fuse([given])


def test_the_command_line_asks_for_those_that_are_not_told(
    pipe: MixOfShowPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.save_pretrained(tmp_path / "base")
    _write(pipe, tmp_path / "dog.safetensors", KOHYA | {"ss_sd_model_name": "some\x1b[2J base"})
    _write(pipe, tmp_path / "ink.safetensors", {}, seed=1)
    (tmp_path / "list.toml").write_text("[[source]]\npath = 'dog.safetensors'\nname = 'mine'\n")
    monkeypatch.chdir(tmp_path)

    def fuse(*arguments: str, method: str = "average") -> str:
        common = ["--method", method, "--base", "base", "--output", "both", "--overwrite"]
        result = CliRunner().invoke(cli.app, ["fuse", *arguments, *common], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    with pytest.warns(MixOfShowWarning, match="dog is recorded with prompts made of"):
        output = fuse("dog.safetensors", "ink.safetensors", "--prompts", "ink style")
    assert "ink.safetensors: LoRA of " in output
    (line,) = (line for line in output.splitlines() if line.startswith("dog.safetensors: LoRA of "))
    assert "rank 1, " in line
    assert line.endswith(", trigger words 'sks dog'")
    assert "\x1b" not in output
    for_all = fuse("dog.safetensors", "ink.safetensors", "--prompts", "a dog", "--prompts", "ink style")
    assert "Wrote the fused pack of dog, ink to both" in for_all
    with pytest.warns(MixOfShowWarning, match="mine is recorded with prompts made of"):
        assert "Wrote the fused pack of mine to both" in fuse("list.toml")
    with pytest.raises(ConfigurationError, match=r"Got --prompts 0 times for 1 plain LoRAs \(ink.safetensors\) whose"):
        fuse("dog.safetensors", "ink.safetensors", method="closed-form")
    with pytest.raises(ConfigurationError, match=r"Got --prompts 3 times for 1 plain LoRAs .*, of 2 in all"):
        fuse("dog.safetensors", "ink.safetensors", *("--prompts", "x") * 3)


def test_a_concept_in_a_list_has_its_own_name(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    packs.random_pack(pipe.components, "rex", ranks=(1,)).save_pretrained(tmp_path / "rex")
    (tmp_path / "list.toml").write_text("[[source]]\npath = 'rex'\nname = 'mine'\n")
    result = CliRunner().invoke(cli.app, ["fuse", str(tmp_path / "list.toml"), "--output", str(tmp_path / "both")])
    assert isinstance(result.exception, ConfigurationError)
    assert "has concepts, which have names of their own: leave name out" in str(result.exception)


def test_inspect_tells_them(tmp_path: Path) -> None:
    tensors = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.ones(1, 768),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight": torch.ones(1280, 1),
    }
    save_file(tensors, tmp_path / "dog.safetensors", metadata=STANDARD)
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "dog.safetensors"), "--json"])
    assert json.loads(result.stdout)["trigger_words"] == ["sks dog"]


def write_sources(folder: Path) -> list[LoRASource]:
    """A plain LoRA whose file states its words, one whose prompts share a word, and one whose words nobody knows."""
    dog = write_lora(folder / "dog.safetensors", dict(packs.random_pack(tiny.components()).lora), STANDARD)
    ink = write_lora(folder / "ink.safetensors", dict(packs.random_pack(tiny.components(), seed=1).lora))
    return [
        LoRASource(dog, ["a sks dog"]),
        LoRASource(ink, ["a house in inkwash", "inkwash, a tree"]),
        LoRASource(ink, ["one", "two"], name="odd"),
    ]


def test_inspect_tells_the_trigger_words_of_every_source_of_a_pack(tmp_path: Path) -> None:
    """Of packs of plain LoRAs alone, and of such with concepts; where nobody knows them, that is said."""
    told, other, odd = write_sources(tmp_path)
    plain = [told, other]
    rex = packs.random_pack(tiny.components(), "rex", seed=2)
    for name, sources in {"both": plain, "mixed": [*plain, rex], "odd": [plain[0], odd]}.items():
        GradientFuser().fuse(sources, method="average").save_pretrained(tmp_path / name)
    run = CliRunner(env={"COLUMNS": "200"})
    for name in ("both", "mixed"):
        shown = json.loads(run.invoke(cli.app, ["inspect", str(tmp_path / name), "--json"]).stdout)
        assert shown["trigger_words_of_sources"] == {"dog": ["sks dog"], "ink": ["inkwash"]}
        assert "dog: sks dog; ink: inkwash" in run.invoke(cli.app, ["inspect", str(tmp_path / name)]).stdout
    assert "dog: sks dog; odd: not known" in run.invoke(cli.app, ["inspect", str(tmp_path / "odd")]).stdout
    shown = run.invoke(cli.app, ["inspect", str(told.source)]).stdout
    assert "sks dog" in shown
    assert "not known" not in shown


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        (STANDARD, "stated by the file (modelspec.trigger_phrase)"),
        (KOHYA, "guessed from the names of folders that it was tuned on (ss_dataset_dirs)"),
        (STANDARD | KOHYA, "stated by the file (modelspec.trigger_phrase)"),
        (
            STANDARD | AI_TOOLKIT,
            "sks dog: stated by the file (modelspec.trigger_phrase); ohwx man: guessed from the names of folders that "
            "it was tuned on (ss_tag_frequency)",
        ),
        ({}, None),
    ],
)
def test_inspect_tells_stated_trigger_words_from_guessed_ones(tmp_path: Path, metadata, told) -> None:
    write_lora(tmp_path / "x.safetensors", dict(packs.random_pack(tiny.components()).lora), metadata)
    run = CliRunner(env={"COLUMNS": "250"})
    table = run.invoke(cli.app, ["inspect", str(tmp_path / "x.safetensors")]).stdout
    assert told in table if told else "trigger words from" not in table
    summary = json.loads(run.invoke(cli.app, ["inspect", str(tmp_path / "x.safetensors"), "--json"]).stdout)
    assert list(summary["trigger_words_from"]) == summary["trigger_words"]


def test_inspect_tells_where_the_trigger_words_of_a_packs_sources_are_from(tmp_path: Path) -> None:
    GradientFuser().fuse(write_sources(tmp_path), method="average").save_pretrained(tmp_path / "both")
    result = CliRunner(env={"COLUMNS": "250"}).invoke(cli.app, ["inspect", str(tmp_path / "both")])
    assert "dog: told by its file; ink: guessed, the words that its prompts share" in result.stdout
