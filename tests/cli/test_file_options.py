"""push, convert, demo, inspect and doctor: what each option does to what is sent, written or told, and what not."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import packs
import tiny
from cli.commands import options_of
from diffusers_mixofshow import EDLoRA, cli, demo
from diffusers_mixofshow.demo import DemoSettings
from diffusers_mixofshow.errors import OverwriteError
from diffusers_mixofshow.interop import read_lora
from interop import foreign as files


def run(*arguments: object) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


PUSHED = {"repo_id": "me/edlora-rex", "private": False, "branch": "main", "summary": "ED-LoRA of <rex>"}
PUSHED |= {"licence": None, "files": {"edlora.safetensors", "README.md"}, "others": set()}
PUSHES = {
    "defaults": ((), {}),
    "repo_id": (("me/dog",), {"repo_id": "me/dog"}),
    "--private": (("--private",), {"private": True}),
    "--revision": (("--revision", "try/2"), {"branch": "try/2", "others": {"main"}}),
    "--message": (("--message", "better ears"), {"summary": "better ears"}),
    "--license": (("--license", "cc0-1.0"), {"licence": "cc0-1.0"}),
    "--create-pr": (("--create-pr",), {"branch": "refs/pr/1", "others": {"main"}}),
}


@pytest.fixture
def signed_in(loopback_hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    packs.random_pack(tiny.components(), "rex").save_pretrained(tmp_path / "rex")
    return loopback_hub


@pytest.mark.parametrize(("options", "changed"), PUSHES.values(), ids=PUSHES)
def test_what_the_hub_gets(signed_in, tmp_path: Path, options: tuple[str, ...], changed: dict[str, Any]) -> None:
    """Every option changes what it says in what arrives, and nothing else."""
    told = run("push", tmp_path / "rex", *options).stdout
    ((repo_id, repository),) = signed_in.repositories.items()
    expected = PUSHED | changed
    where = f"{repo_id}/discussions/1" if "--create-pr" in options else repo_id
    assert told == f"Pushed to {signed_in.url}/{where}\n"
    _, summary, content = repository.branches[expected["branch"]][-1]
    card = ModelCard(content["README.md"].decode())
    arrived = {
        "repo_id": repo_id,
        "private": repository.private,
        "branch": expected["branch"],
        "summary": summary,
        "licence": card.data.license,
        "files": set(content) - {".gitattributes"},
        "others": {name for name, history in repository.branches.items() if len(history) == 1},
    }
    assert arrived == expected


def test_a_merged_push_is_a_complete_pipeline(signed_in, tmp_path: Path) -> None:
    StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False).save_pretrained(tmp_path / "base")
    pack = replace(EDLoRA.from_pretrained(tmp_path / "rex"), base_model=str(tmp_path / "base"))
    pack.save_pretrained(tmp_path / "on base")
    run("push", tmp_path / "on base", "--merged")
    content = signed_in.repositories["me/edlora-rex"].branches["main"][-1][2]
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "edlora.safetensors"} <= set(content)


def test_a_dry_push_tells_the_name_that_was_given_and_sends_nothing(signed_in, tmp_path: Path) -> None:
    told = json.loads(run("push", tmp_path / "rex", "me/dog", "--private", "--dry-run", "--json").stdout)
    assert told == {"repo_id": "me/dog", "concepts": ["<rex>"], "private": True, "logged_in": True}
    assert run("push", tmp_path / "rex", "me/dog", "--dry-run").stdout == "Would push <rex> to me/dog\n"
    assert not signed_in.repositories
    assert json.loads(run("push", tmp_path / "rex", "--json").stdout) == {"url": f"{signed_in.url}/me/edlora-rex"}


def test_every_option_of_push_is_in_one_of_these_tests() -> None:
    assert {*PUSHES} - {"defaults"} | {"source", "--merged", "--dry-run", "--json"} == options_of("push")


NAMED = {"placeholder": "<rex>", "class_word": "thing", "kind": "object", "base": "stable-diffusion-v1-5/"}
CONVERSIONS = {
    "--to": ((), {}),
    "--name": (("--name", "kit"), {"placeholder": "<kit>"}),
    "--class-word": (("--class-word", "gray dog"), {"class_word": "gray dog"}),
    "--kind": (("--kind", "pet"), {"kind": "pet"}),
    "--base": (("--base", "someone/base"), {"base": "someone/base"}),
}


@pytest.mark.parametrize(("options", "changed"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_what_a_converted_file_tells(tmp_path: Path, options: tuple[str, ...], changed: dict[str, str]) -> None:
    files.original(tmp_path / "rex.pth")
    run("convert", tmp_path / "rex.pth", tmp_path / "out", "--to", "edlora", *options)
    pack = EDLoRA.from_pretrained(tmp_path / "out")
    (concept,) = pack.concepts
    expected = NAMED | changed
    told = {"placeholder": concept.placeholder, "class_word": concept.class_word, "kind": concept.kind}
    assert told == {name: expected[name] for name in told}
    assert pack.base_model.startswith(expected["base"])


FORMATS = {
    "edlora": ["edlora.safetensors", "README.md"],
    "diffusers": ["HOW_TO_USE.txt", "embeddings/rex.safetensors", "pytorch_lora_weights.safetensors"],
    "kohya": ["HOW_TO_USE.txt", "embeddings/rex.safetensors", "rex.safetensors"],
    "textual-inversion": ["rex.safetensors"],
    "mix-of-show": ["edlora_model-latest.pth"],
}


@pytest.mark.parametrize(("to", "expected"), FORMATS.items(), ids=FORMATS)
def test_each_format_is_written_and_nothing_in_place_of_another(tmp_path: Path, to: str, expected: list[str]) -> None:
    packs.random_pack(tiny.components(), "rex").save_pretrained(tmp_path / "rex")
    output = tmp_path / "out"
    told = run("convert", tmp_path / "rex", output, "--to", to)
    found = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    assert found == sorted(expected)
    wrote = told.stdout.splitlines()
    assert set(wrote) <= {f"Wrote {output / name}" for name in expected}
    assert set(wrote) >= {f"Wrote {output / name}" for name in expected if name != "README.md"}
    first = output / wrote[0].removeprefix("Wrote ")
    before = first.read_bytes()
    packs.random_pack(tiny.components(), "rex", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(OverwriteError, match=r"(is|are) there already"):
        run("convert", tmp_path / "other", output, "--to", to)
    assert first.read_bytes() == before
    again = run("convert", tmp_path / "other", output, "--to", to, "--overwrite", "--json")
    assert Path(json.loads(again.stdout)["files"][0]).name == first.name
    assert first.read_bytes() != before


def test_the_lora_of_a_concept_that_gets_its_name_here_holds_its_layer_wise_embeddings(tmp_path: Path) -> None:
    """With --base, --name and --class-word reach what is put into the LoRA, and are not asked for a second time."""
    StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False).save_pretrained(tmp_path / "base")
    pack = packs.random_pack(tiny.components(), "rex")
    pack.save_pretrained(tmp_path / "rex")
    run("convert", tmp_path / "rex", tmp_path / "rex.pth", "--to", "mix-of-show")
    named = ("--name", "kit", "--class-word", "cat", "--kind", "pet")
    for number, source in enumerate((("rex",), ("rex.pth", *named))):
        asked = ("--to", "diffusers", "--base", tmp_path / "base")
        run("convert", tmp_path / source[0], tmp_path / f"out-{number}", *asked, *source[1:])
    plain, renamed = (read_lora(tmp_path / f"out-{n}" / "pytorch_lora_weights.safetensors") for n in (0, 1))
    assert plain.keys() == renamed.keys()
    assert [file.name for file in (tmp_path / "out-1" / "embeddings").iterdir()] == ["kit.safetensors"]


def test_one_word_of_a_plain_file_is_called_as_asked(tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "style.safetensors")
    run("convert", tmp_path / "style.safetensors", tmp_path / "out", "--to", "textual-inversion", "--name", "kit")
    (written,) = (tmp_path / "out").iterdir()
    assert written.name == "kit.safetensors"
    assert {tuple(value.shape) for value in load_file(written).values()} == {(2, 768)}


def test_every_option_of_convert_is_in_one_of_these_tests() -> None:
    assert {*CONVERSIONS} | {"source", "output", "--overwrite", "--json"} == options_of("convert")


DEMOS = {
    "defaults": ((), {}),
    "--output": (("--output", "here"), {"folder": Path("here")}),
    "--seed": (("--seed", "3"), {"seed": 3}),
    "--overwrite": (("--overwrite",), {"overwrite": True}),
    "--photos and --class-word": (
        ("--photos", "mine", "--class-word", "dog"),
        {"photos": Path("mine"), "class_word": "dog"},
    ),
}


@pytest.mark.parametrize(("options", "changed"), DEMOS.values(), ids=DEMOS)
def test_options_of_the_demo_are_its_settings(tmp_path: Path, monkeypatch, options, changed) -> None:
    """The demo itself, which takes minutes, has tests of its own."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    asked: list[DemoSettings] = []

    def run_demo(settings: DemoSettings, console: Any) -> Path:
        asked.append(settings)
        assert console.stderr
        (tmp_path / "report.json").write_text('{"seed": 3}')
        return tmp_path / "index.html"

    monkeypatch.setattr(demo, "run_demo", run_demo, raising=False)
    usual = DemoSettings(folder=Path("mixofshow-demo"), seed=0)
    assert run("demo", *options).stdout == f"Open {tmp_path / 'index.html'}\n"
    assert json.loads(run("demo", *options, "--json").stdout) == {"seed": 3}
    assert asked == [replace(usual, **changed)] * 2


def test_every_option_of_demo_inspect_and_doctor_is_in_one_of_these_tests() -> None:
    assert {"--output", "--seed", "--overwrite", "--photos", "--class-word", "--json"} == options_of("demo")
    assert options_of("doctor") == {"named", "--base", "--json"}
    assert options_of("inspect") == {"sources", "--json"}


def test_inspect_tells_the_same_in_tables_and_as_json(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    pack = packs.random_pack(tiny.components(), "rex", "tom", ranks=(2, 4), alphas=(1.0, 4.0))
    pack.save_pretrained(tmp_path / "both")
    told = json.loads(run("inspect", tmp_path / "both", "--json").stdout)
    numbers = sum(update.down.numel() + update.up.numel() for update in pack.lora.values())
    expected = {
        "kind": "ED-LoRA",
        "source": str(tmp_path / "both"),
        "base_model": "someone/tiny",
        "ranks": [2, 4],
        "alphas": [1.0, 4.0],
        "adapted_layers": len(pack.lora),
        "cross_attention_layers": 4,
        "parameters": numbers + sum(rows.numel() for rows in pack.embeddings.values()),
        "dtypes": ["float32"],
        "bytes": (tmp_path / "both" / "edlora.safetensors").stat().st_size,
        "problems": [],
    }
    assert {name: told[name] for name in expected} == expected
    for concept, names in zip(told["concepts"], pack.concepts, strict=True):
        assert (concept["placeholder"], concept["class_word"], concept["kind"]) == (names.placeholder, "dog", "pet")
        for token, norm in concept["tokens"].items():
            assert norm == pytest.approx(float(pack.embeddings[token].norm(dim=1).mean()), abs=1e-3)
    norms = {site: float((u.alpha / u.rank * u.up @ u.down).norm()) for site, u in pack.lora.items()}
    largest = dict(sorted(norms.items(), key=lambda entry: -entry[1])[: len(told["largest_updates"])])
    assert told["largest_updates"] == {site: pytest.approx(norm, abs=1e-3) for site, norm in largest.items()}
    table = run("inspect", tmp_path / "both").stdout
    for text in ("ED-LoRA", "someone/tiny", "2, 4", "1, 4", f"{expected['parameters']:,} (float32)", *largest):
        assert text in table
    for concept in told["concepts"]:
        for token, norm in concept["tokens"].items():
            assert f"{token} {norm:.3f}" in table


def test_doctor_tells_the_same_in_a_table_and_as_json(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    told = json.loads(run("doctor", "--json").stdout)
    lines = run("doctor").stdout.splitlines()
    for finding in (each for each in told if each["state"] != "optional"):  # whose line below the table says all
        row = next(line for line in lines if f" {finding['name']} " in line and finding["state"] in line)
        assert finding["name"] == "memory" or finding["found"][:40] in row or "GB" in finding["found"]
    urgency = {"problem": 0, "ok": 1, "note": 1, "optional": 2}
    told.sort(key=lambda finding: urgency[finding["state"]])
    mended = [f"  {finding['name']}: {finding['remedy']}" for finding in told if finding["remedy"]]
    assert [line for line in lines if line in mended] == mended
    based = run("doctor", "toyland").stdout
    assert "base model" not in "".join(lines)
    assert "toyland: Stable Diffusion; concepts, regions and tuning; guidance 3" in based
