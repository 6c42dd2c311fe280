"""inspect, convert, push and doctor as their users meet them, and what all verbs share."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.main import get_command
from typer.testing import CliRunner

import packs
import tiny
from cli.commands import VERBS
from diffusers_mixofshow import EDLoRA, cli, toyland
from diffusers_mixofshow.cli import diagnosis
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, EDLoRAFormatError
from diffusers_mixofshow.exporting.shared import RANK_OF_A_CONCEPT
from diffusers_mixofshow.interop import convert, read_lora
from diffusers_mixofshow.interop.lora_files import write_lora
from diffusers_mixofshow.interop.summary import summary_of_pack
from interop import foreign as files


RUNNER = CliRunner()


def run(*arguments: object):
    return RUNNER.invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_inspect_tells_of_the_authors_checkpoint(tmp_path: Path):
    files.original(tmp_path / "rex.pth")
    result = run("inspect", tmp_path / "rex.pth", "--json")
    summary = json.loads(result.stdout)
    assert result.exit_code == 0
    assert summary["kind"] == "ED-LoRA of the authors' code"
    assert summary["architecture"] == "Stable Diffusion 1.x"
    assert [concept["placeholder"] for concept in summary["concepts"]] == ["<rex>"]
    assert set(summary["concepts"][0]["tokens"]) == {"<rex1>", "<rex2>"}
    assert (summary["ranks"], summary["adapted_layers"], summary["cross_attention_layers"]) == ([2], 3, 16)
    assert summary["layers"] == {"text_encoder": 1, "unet": 2}
    assert summary["bytes"] == (tmp_path / "rex.pth").stat().st_size
    assert summary["problems"] == []


def test_inspect_tells_of_a_lora_and_its_norms(tmp_path: Path):
    tensors = files.kohya(tmp_path / "style.safetensors")
    summary = json.loads(run("inspect", tmp_path / "style.safetensors", "--json").stdout)
    assert (summary["kind"], summary["layout"]) == ("LoRA", "kohya / A1111 / ComfyUI")
    assert (summary["ranks"], summary["alphas"], summary["scalings"]) == ([2, 4], [1.0, 2.0], [0.25, 1.0])
    assert (summary["dtypes"], summary["training"]["ss_network_dim"]) == (["float16"], "4")
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    halves = [tensors[f"{name}.{half}.weight"].double() for half in ("lora_up", "lora_down")]
    norm = summary["largest_updates"]["text_encoder.text_model.encoder.layers.0.mlp.fc1"]
    assert norm == pytest.approx(0.25 * float((halves[0] @ halves[1]).norm()), abs=1e-3)
    table = run("inspect", tmp_path / "style.safetensors").stdout
    assert re.search(r"layout\W+kohya / A1111", table)


def test_inspect_tells_trigger_words_or_that_there_are_none(tmp_path: Path):
    files.kohya(tmp_path / "silent.safetensors")
    with safe_open(tmp_path / "silent.safetensors", "pt") as silent:
        metadata, tensors = silent.metadata(), {name: silent.get_tensor(name) for name in silent.keys()}
    told = metadata | {"modelspec.trigger_phrase": "sks dog, sks"}
    save_file(tensors, tmp_path / "told.safetensors", metadata=told)
    packs.random_pack(tiny.components(), "rex").save_pretrained(tmp_path / "rex")
    names = ("silent.safetensors", "told.safetensors", "rex")
    tables = {name: run("inspect", tmp_path / name).stdout for name in names}
    assert re.search(r"trigger words\W+none\b", tables["silent.safetensors"])
    assert re.search(r"trigger words\W+sks dog, sks\b", tables["told.safetensors"])
    assert "trigger words" not in tables["rex"]


def test_inspect_tells_of_several_files_and_of_those_that_cannot_be_read(tmp_path: Path):
    for name in ("rex", "tom"):
        packs.random_pack(tiny.components(), name).save_pretrained(tmp_path / name)
    both = run("inspect", tmp_path / "rex", tmp_path / "tom")
    assert both.exit_code == 0
    assert both.stdout.index("<rex>") < both.stdout.index("<tom>")
    told = json.loads(run("inspect", tmp_path / "rex", tmp_path / "tom", "--json").stdout)
    assert [summary["source"] for summary in told] == [str(tmp_path / "rex"), str(tmp_path / "tom")]
    (tmp_path / "x.safetensors").write_bytes(b"")
    result = run("inspect", tmp_path / "x.safetensors", tmp_path / "tom")
    assert result.exit_code == cli.FAILED
    assert "<tom>" in result.stdout
    assert f"Error: {tmp_path / 'x.safetensors'}" in result.stderr
    nothing = run("inspect", tmp_path / "x.safetensors", tmp_path / "x.safetensors", "--json")
    assert (nothing.exit_code, json.loads(nothing.stdout)) == (cli.FAILED, [])


def test_inspect_names_problems_and_fails(tmp_path: Path):
    site = "lora_unet_mid_block_attentions_0_proj_in"
    save_file(
        {f"{site}.lora_down.weight": torch.ones(1, 8), f"{site}.dora_scale": torch.ones(8)}, tmp_path / "x.safetensors"
    )
    result = run("inspect", tmp_path / "x.safetensors", "--json")
    assert result.exit_code == cli.FAILED
    problems = " ".join(json.loads(result.stdout)["problems"])
    assert "DoRA" in problems
    assert "only one of the two matrices" in problems


def test_on_a_terminal_problems_are_red_and_notes_yellow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    summary = {"problems": ["it is [broken]"], "notes": ["it is [odd]"]}
    monkeypatch.setattr(
        "diffusers_mixofshow.interop.summary.summary_of_pack", lambda pack: summary_of_pack(pack) | summary
    )
    packs.random_pack(tiny.components(), "rex").save_pretrained(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    result = run("inspect", tmp_path)
    assert result.exit_code == cli.FAILED
    assert "\x1b[31mit is [broken]" in result.stdout
    assert "\x1b[33mit is [odd]" in result.stdout


def test_inspect_tells_an_ed_lora_from_other_files_by_what_is_in_it(tmp_path: Path):
    packs.random_pack(tiny.components(), "rex").save_pretrained(tmp_path)
    (tmp_path / "edlora.safetensors").rename(tmp_path / "renamed.safetensors")
    summary = json.loads(run("inspect", tmp_path / "renamed.safetensors", "--json").stdout)
    assert (summary["kind"], summary["base_model"]) == ("ED-LoRA", "someone/tiny")
    (tmp_path / "edlora.safetensors").write_bytes(b"")
    with pytest.raises(EDLoRAFormatError):
        run("inspect", tmp_path)


def test_inspect_knows_fusion_statistics_and_sends_to_their_ed_lora():
    folder = Path(__file__).parents[1] / "compatibility" / "files" / "format-1"
    with pytest.raises(EDLoRAFormatError, match=r"fusion statistics.*edlora\.safetensors beside it"):
        run("inspect", folder / "edlora.statistics.safetensors")


def test_convert_there_and_back(tmp_path: Path):
    params = files.original(tmp_path / "rex.pth")
    result = run("convert", tmp_path / "rex.pth", tmp_path / "rex", "--to", "edlora", "--class-word", "dog")
    assert result.stdout.strip() == f"Wrote {tmp_path / 'rex' / 'edlora.safetensors'}"
    assert "does not name its base model" in result.stderr
    with pytest.raises(ConfigurationError, match="is written into a folder"):
        run("convert", tmp_path / "rex", tmp_path / "rex.safetensors", "--to", "edlora")
    run("convert", tmp_path / "rex", tmp_path / "back.pth", "--to", "mix-of-show")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["params"]
    for part, tensors in params.items():
        assert all(torch.equal(tensor, back[part][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("to", ["kohya", "diffusers", "textual-inversion"])
def test_class_word_and_kind_survive_the_way_through_other_programs_files(tmp_path: Path, to: str):
    concepts = {"rex": ("gray dog", "pet"), "town": ("street", "scene")}
    pack = packs.random_pack(tiny.components(), *concepts)
    named = tuple(
        replace(one, class_word=word, kind=kind)
        for one, (word, kind) in zip(pack.concepts, concepts.values(), strict=True)
    )
    replace(pack, concepts=named).save_pretrained(tmp_path / "both")
    run("convert", tmp_path / "both", tmp_path / "out", "--to", to)
    shown = json.loads(run("inspect", tmp_path / "out", "--json").stdout)["concepts"]
    assert {one["placeholder"]: (one["class_word"], one["kind"]) for one in shown} == {
        f"<{name}>": told for name, told in concepts.items()
    }
    layers = ("--base", str(tmp_path / "base"))
    StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False).save_pretrained(tmp_path / "base")
    run("convert", tmp_path / "out", tmp_path / "back", "--to", "edlora", *layers)
    back = EDLoRA.from_pretrained(tmp_path / "back")
    assert {one.name: (one.class_word, one.kind) for one in back.concepts} == concepts
    given = ("--class-word", "cat", "--kind", "object")  # goes before the file's own
    run("convert", tmp_path / "out", tmp_path / "given", "--to", "edlora", *layers, *given)
    told = EDLoRA.from_pretrained(tmp_path / "given").concepts
    assert {(one.class_word, one.kind) for one in told} == {("cat", "object")}


@pytest.mark.parametrize(
    "told",
    [
        "3",
        '{"class_word": 3, "kind": "pet"}',
        '{"class_word": "dog", "kind": "dragon"}',
        '{"class_word": "dog", "kind": ["pet"]}',
        '{"class_word": " ", "kind": "pet"}',
        '{"class_word": "a\\u001b[31m", "kind": "pet"}',
        json.dumps({"class_word": "x" * 101, "kind": "pet"}),
        "[" * 100_000,
    ],
)
def test_a_class_word_in_a_file_is_not_trusted(tmp_path: Path, told: str):
    save_file({"<rex>": torch.ones(1, 768)}, tmp_path / "rex.safetensors", metadata={"mixofshow_concept": told})
    (concept,) = json.loads(run("inspect", tmp_path / "rex.safetensors", "--json").stdout)["concepts"]
    assert (concept["class_word"], concept["kind"]) == (None, None)


def test_convert_prints_what_machines_read(tmp_path: Path):
    packs.random_pack(tiny.components(), "rex", "kit").save_pretrained(tmp_path / "both")
    result = run("convert", tmp_path / "both", tmp_path / "out", "--to", "kohya", "--json")
    told = json.loads(result.stdout)
    assert [Path(file).name for file in told["files"]] == [
        "rex-kit.safetensors",
        "rex.safetensors",
        "kit.safetensors",
        "HOW_TO_USE.txt",
    ]
    assert "ed-lora-shared-layers, which converts without loss" in told["lost"][0]
    assert all(word in told["lost"][0] for word in ("Most of the identity", "--base", "ed-lora-shared-layers"))
    assert all(f"Lost: {sentence}" in result.stderr for sentence in told["lost"])
    assert any(name.startswith("lora_te_text_model_") for name in load_file(told["files"][0]))


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "tiff", "webp", "gif"])
def test_inspect_says_that_a_picture_is_one_and_what_it_expects(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / f"dog.{kind}")
    with pytest.raises(
        EDLoRAFormatError, match=r"it is a \w+ picture.*Expected an ED-LoRA, LoRA or textual inv"
    ) as caught:
        CliRunner().invoke(cli.app, ["inspect", str(tmp_path / f"dog.{kind}")], catch_exceptions=False)
    assert "save_pretrained" not in str(caught.value)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_convert_with_the_base_puts_layer_wise_embeddings_into_the_lora(tmp_path: Path, to: str):
    pipe = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "base")
    pack = packs.random_pack(pipe.components, "rex")
    pack.save_pretrained(tmp_path / "rex")
    convert(pack, tmp_path / "rex.pth", "mix-of-show")
    for source in ("rex", "rex.pth"):
        result = run("convert", tmp_path / source, tmp_path / f"out-{source}", "--to", to, "--base", tmp_path / "base")
        assert "is in the LoRA" in result.stderr
        assert "Most of the identity" not in result.stderr
        (lora,) = (tmp_path / f"out-{source}").glob("*.safetensors")
        assert {update.rank for update in read_lora(lora).values()} == {4, 4 + RANK_OF_A_CONCEPT}
        assert "is in the LoRA" in (tmp_path / f"out-{source}" / "HOW_TO_USE.txt").read_text()


def test_convert_takes_the_layers_of_a_base_on_this_disk(tmp_path: Path):

    pipe = toyland.load_pipeline()
    width = pipe.text_encoder.config.hidden_size
    save_file({"<rex>": torch.ones(1, width)}, tmp_path / "rex.safetensors")
    arguments = ["convert", tmp_path / "rex.safetensors", tmp_path / "rex", "--to", "edlora", "--base", "toyland"]
    assert run(*arguments).exit_code == 0
    EDLoRA.from_pretrained(tmp_path / "rex").check_fits(pipe.components)


def test_push_sends_a_pack_and_a_dry_run_sends_nothing(tmp_path: Path, loopback_hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    packs.random_pack(tiny.components(), "rex").save_pretrained(tmp_path)
    told = json.loads(run("push", tmp_path, "--dry-run", "--json").stdout)
    assert told == {"repo_id": "edlora-rex", "concepts": ["<rex>"], "private": False, "logged_in": True}
    assert not loopback_hub.repositories
    result = run("push", tmp_path, "--json")
    assert json.loads(result.stdout)["url"] == f"{loopback_hub.url}/me/edlora-rex"


def test_a_pull_request_of_nothing_new_is_not_opened_and_told(tmp_path: Path, loopback_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    packs.random_pack(tiny.components(), "rex").save_pretrained(tmp_path)
    run("push", tmp_path)
    result = run("push", tmp_path, "--create-pr")
    assert "no pull request was opened" in result.stderr
    assert list(loopback_hub.repositories["me/edlora-rex"].branches) == ["main"]


def test_a_dry_push_tells_that_nobody_is_logged_in(tmp_path: Path, loopback_hub):
    packs.random_pack(tiny.components(), "rex").save_pretrained(tmp_path)
    result = run("push", tmp_path, "--dry-run")
    assert result.stdout == "Would push <rex> to edlora-rex\n"
    assert "nobody is logged in" in result.stderr
    assert "hf auth login" in result.stderr


def test_doctor_finds_this_machine_well():
    result = run("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert {"Python", "torch", "diffusers", "CPU", "memory", "Hub cache", "embedded base"} <= set(findings)
    assert [name for name, finding in findings.items() if finding["state"] == "problem"] == []
    assert result.exit_code == 0


def test_doctor_says_how_to_mend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        diagnosis.metadata, "requires", lambda _: ["torch>=99", "no-such-package>=1", "x>=1; extra=='dev'"]
    )
    found = {finding.name: finding for finding in diagnosis.diagnose()}
    assert found["torch"].state == found["no-such-package"].state == "problem"
    assert 'pip install "torch>=99"' in found["torch"].remedy
    assert "x" not in found


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_doctor_names_a_library_that_does_not_accept_the_installed_peft(library: str, monkeypatch: pytest.MonkeyPatch):
    wants = importlib.import_module(diagnosis._LEAST_PEFT[library])
    monkeypatch.setattr(wants, "MIN_PEFT_VERSION", "99.1")
    result = run("doctor", "--json")
    finding = {each["name"]: each for each in json.loads(result.stdout)}[library]
    assert result.exit_code == 1
    assert finding["state"] == "problem"
    assert re.fullmatch(r"[\d.]+ does not work beside peft [\d.]+, needs >=99.1", finding["found"])
    assert 'pip install "peft>=99.1"' in finding["remedy"]
    assert f'or another {library}: pip install "{library}' in finding["remedy"]


def test_doctor_names_a_library_whose_own_needs_are_not_met(monkeypatch: pytest.MonkeyPatch):
    needs = {"transformers": ["tokenizers>=99", "torch>=99; extra == 'torch'"]}
    honest = diagnosis.metadata.requires
    monkeypatch.setattr(diagnosis.metadata, "requires", lambda name: needs.get(name) or honest(name))
    found = {finding.name: finding for finding in diagnosis.diagnose()}
    assert [name for name, finding in found.items() if finding.state == "problem"] == ["transformers"]
    assert "beside tokenizers" in found["transformers"].found
    assert "torch" not in found["transformers"].found


def test_doctor_breaks_no_command_in_two(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(diagnosis.metadata, "requires", lambda _: ["a-package-with-a-long-name>=1.2.3,<2.0.0"])
    command = 'pip install "a-package-with-a-long-name<2.0.0,>=1.2.3"'
    assert f"\n  a-package-with-a-long-name: {command}\n" in run("doctor").stdout


def test_doctor_finds_every_extra_that_users_may_want(monkeypatch: pytest.MonkeyPatch):
    offered = diagnosis.metadata.metadata("diffusers-mixofshow").get_all("Provides-Extra")
    found = {finding.name: finding for finding in diagnosis.diagnose()}
    told = {name for name in found if name.startswith("extra ")}
    assert told == {f"extra {name}" for name in offered} - {"extra browser", "extra dev", "extra docs"}
    monkeypatch.setattr(
        diagnosis.metadata,
        "requires",
        lambda _: ["torch>=2", "no-such-package>=1; extra == 'heic'", "torch>=99; extra == 'wandb'"],
    )
    found = {finding.name: finding for finding in diagnosis.diagnose()}
    assert (found["extra heic"].state, found["extra heic"].found) == ("optional", "no-such-package not installed")
    assert found["extra heic"].remedy == 'for photos of iPhones (HEIC): pip install "diffusers-mixofshow[heic]"'
    assert "needs >=99" in found["extra wandb"].found
    assert found["extra wandb"].state == "note", "an extra that is too old is not the same as none"


def test_doctor_never_shows_a_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = run("doctor", "--json")
    assert "hf_secret" not in result.output
    assert "logged in" in result.output


def test_dry_runs_load_no_model_and_write_nothing(tmp_path: Path):
    for name in ("rex", "kit"):
        packs.random_pack(tiny.components(), name).save_pretrained(tmp_path / name)
    output = tmp_path / "out"
    result = run("fuse", tmp_path / "rex", tmp_path / "kit", "--output", output, "--dry-run")
    assert "<rex>, <kit>" in result.stdout
    assert "someone/tiny" in result.stdout
    assert "rank: at most 8" in result.stdout
    arguments = ["--prompt", "a <rex>", "--count", "3", "--output", output / "x.png", "--dry-run"]
    result = run("sample", "--concepts", tmp_path / "rex", *arguments)
    assert "U-Net runs: 20, each on a batch of 6" in result.stdout
    assert str(output / "x-2.png") in result.stdout
    assert not output.exists()
    misspelt = ["--prompt", "two pets", "--region", "0,0,0.5,1:a <rx>", "--dry-run"]
    with pytest.raises(ConceptError, match="<rex>"):
        run("sample", "--concepts", tmp_path / "rex", *misspelt)


def test_options_out_of_a_file(tmp_path: Path):
    packs.random_pack(tiny.components(), "rex").save_pretrained(tmp_path / "rex")
    config = tmp_path / "settings.toml"
    lines = ["[sample]", 'prompt = "a <rex>"', f'concepts = "{tmp_path / "rex"}"', "count = 3", "dry-run = true"]
    config.write_text("\n".join(lines))
    assert "batch of 6" in run("--config", config, "sample").stdout
    assert "batch of 2" in run("--config", config, "sample", "--count", "1").stdout
    config.write_text("[sample]\ncuont = 3\n[bake]\n")
    with pytest.raises(ConfigurationError, match=r"no option 'cuont' \(did you mean 'count'\?\); 'bake'"):
        run("--config", config, "sample")


def test_every_spelling_of_every_option_may_stand_in_the_file(tmp_path: Path):
    config = tmp_path / "settings.toml"
    lines = []
    for verb, command in get_command(cli.app).commands.items():
        spellings = [spelling.lstrip("-") for parameter in command.params for spelling in parameter.opts]
        lines += [f"[{verb}]", *(f'{spelling} = "x"' for spelling in spellings)]
    assert {'json = "x"', 'base = "x"', 'output-dir = "x"'} <= set(lines)
    config.write_text("\n".join(lines))
    assert run("--config", config, "doctor", "--help").exit_code == 0


def test_help_shows_every_word_that_it_holds():
    """Markup of rich takes what stands in brackets for a style, and drops it."""
    eaten = [
        f"{verb} {parameter.name}"
        for verb, command in get_command(cli.app).commands.items()
        for parameter in command.params
        if re.search(r"\[\w", getattr(parameter, "help", None) or "")
    ]
    assert eaten == []


def test_examples_in_help_stand_on_lines_of_their_own():
    result = RUNNER.invoke(cli.app, ["sample", "--help"], env={"COLUMNS": "100"})
    lines = [line.strip() for line in result.output.splitlines()]
    assert "mixofshow sample --concepts mixofshow-demo/fused --output both.png \\" in lines
    assert '--refine --prompt "a critter and a dog in a meadow" \\' in lines


def plan_fusing(folder: Path, lora: Mapping[str, LowRank]) -> dict[str, Any]:
    """The plan of fusing a LoRA with itself."""
    given = [str(write_lora(folder / f"{name}.safetensors", lora)) for name in ("one", "two")]
    asked = ["--prompts", "a dog", "--prompts", "a cat", "--output", str(folder / "both"), "--dry-run", "--json"]
    return json.loads(run("fuse", *given, *asked).stdout)


def test_fusing_files_that_name_no_base_suggests_the_one_that_their_layers_are_of(tmp_path: Path):
    """It may be another one with the same layers, and would be downloaded."""
    site = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    lora = {site: LowRank(down=torch.ones(1, 768), up=torch.ones(320, 1), alpha=1.0)}
    told = r"got none\. Name it with --base stable-diffusion-v1-5/stable-diffusion-v1-5 \(by their layers"
    with pytest.raises(ConfigurationError, match=told):
        plan_fusing(tmp_path, lora)


def test_fusing_files_with_the_layers_of_an_embedded_base_takes_it(tmp_path: Path):
    """As sample, evaluate and compare do: no other base has these layers."""
    pack = packs.random_pack(toyland.load_pipeline().components, ranks=(1,))
    assert plan_fusing(tmp_path, pack.lora)["base model"].startswith("toyland, ")


@pytest.mark.parametrize("verb", VERBS)
def test_examples_in_help_can_be_pasted_from_a_terminal_of_80_columns(verb: str):
    shown = RUNNER.invoke(cli.app, [verb, "--help"], env={"COLUMNS": "80"}).output
    assert not [line for line in shown.splitlines() if line.strip() == "\\"]


def test_wrong_settings_end_with_2_and_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("sys.argv", ["mixofshow", "sample", "--prompt", "a castle"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == cli.WRONG_USE
    assert capsys.readouterr().err.startswith("Error: ")
