"""`mixofshow fuse` makes the pack that the same settings make in Python."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

import packs
import tiny
from cli.commands import named_in, options_of
from diffusers_mixofshow import EDLoRA, GradientFuser, MixOfShowPipeline, cli
from diffusers_mixofshow.cli.fuse import Method
from diffusers_mixofshow.errors import ConfigurationError, FusionError, MixOfShowWarning, OverwriteError
from diffusers_mixofshow.fusion.prompts import RECORDING_PROMPTS
from diffusers_mixofshow.interop.lora_files import write_lora


HALVES = {"0,0.1,0.5,0.97": "rex", "0.5,0.1,1,0.97": "tom"}
"""Regions of two concepts side by side."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a base, three ED-LoRAs of which two bring statistics, and a plain LoRA."""
    folder = tmp_path_factory.mktemp("place")
    StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False).save_pretrained(folder / "base")
    pipe = MixOfShowPipeline.from_pretrained(folder / "base")
    fuser = GradientFuser(pipe, sequential=False, steps=2, prompts=["a <TOK>", "<TOK> here", "the <TOK>", "no <TOK>"])
    for seed, name in enumerate(("rex", "tom", "bare")):
        packs.random_pack(tiny.components(), name, ranks=(2,), seed=seed).save_pretrained(folder / name)
        if name != "bare":
            fuser.record(folder / name)
    write_lora(folder / "dog.safetensors", dict(packs.random_pack(tiny.components(), "any", ranks=(2,)).lora))
    return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of every fuser that is made, and of every call; what is recorded is one prompt in one step."""
    settings: list[dict[str, Any]] = []
    usual, fuse = GradientFuser.__init__, GradientFuser.fuse

    def noted(self: GradientFuser, pipe: Any = None, **given: Any) -> None:
        settings.append(dict(given))
        usual(self, pipe, **given, **({} if pipe is None else {"steps": 1, "prior_prompts": ["x"]}))

    def noting(self: GradientFuser, sources: Any, **given: Any) -> Any:
        settings[-1] |= given
        return fuse(self, sources, **given)

    monkeypatch.setitem(RECORDING_PROMPTS, "pet", ("a <TOK>",))
    monkeypatch.setattr(GradientFuser, "__init__", noted)
    monkeypatch.setattr(GradientFuser, "fuse", noting)
    return settings


def run(*arguments: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of statistics that are there but not used
        return CliRunner().invoke(cli.app, ["fuse", *arguments], catch_exceptions=False).stdout


def updates(pack: EDLoRA) -> dict[str, torch.Tensor]:
    return {site: update.alpha / update.rank * update.up @ update.down for site, update in pack.lora.items()}


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether every layer is changed alike, as far as half precision can tell."""
    return one.keys() == other.keys() and all(
        (one[site] - other[site]).norm() <= 2e-3 * one[site].norm() for site in one
    )


USUAL = {"method": "closed-form", "weights": None, "ridge": None, "max_rank": None, "device": "cpu"}
IN_ORDER = {"prior": 0, "sequential": True}
TABLE = [
    ((), {}),
    (("--method", "average"), {"method": "average"}),
    (("--method", "sum"), {"method": "sum"}),
    (("--method", "average", "--weight", "3", "--weight", "1"), {"method": "average", "weights": [3, 1]}),
    (("--weight", "1", "--weight", "5"), {"weights": [1, 5]}),
    (("--ridge", "0.5"), {"ridge": 0.5}),
    (("--ridge", "0"), {"ridge": 0.0}),
    (("--ridge", "auto"), {"ridge": "auto"}),
    (("--max-rank", "1"), {"max_rank": 1}),
    (("--base", "base", "--features", "own", "--prior", "2"), {"prior": 2, "sequential": False}),
    (
        ("--base", "base", "--features", "sequential", "--ridge", "0.5", "--prior", "2"),
        IN_ORDER | {"ridge": 0.5, "prior": 2},
    ),
]
"""Options of two sources that bring statistics, and what is not usual of the fuser's settings and its call."""
MADE: dict[tuple[str, ...], Any] = {}


@pytest.mark.parametrize(("options", "settings"), TABLE, ids=lambda each: " ".join(each) or "defaults")
def test_the_command_line_fuses_what_python_fuses(place, monkeypatch, made, tmp_path, options, settings) -> None:
    monkeypatch.chdir(place)
    told = json.loads(run("rex", "tom", *options, "--output", str(tmp_path / "both"), "--json"))
    fused = EDLoRA.from_pretrained(tmp_path / "both")
    assert made == [USUAL | settings]
    pipe = MixOfShowPipeline.from_pretrained("base") if "--base" in options else None
    asked = {name: value for name, value in settings.items() if name not in ("method", "weights")}
    call = {name: value for name, value in settings.items() if name in ("method", "weights")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = GradientFuser(pipe, **asked).fuse(["rex", "tom"], **call)
    expected.save_pretrained(tmp_path / "expected")
    MADE[options] = updates(fused)
    assert alike(MADE[options], updates(EDLoRA.from_pretrained(tmp_path / "expected")))
    assert [concept.placeholder for concept in fused.concepts] == ["<rex>", "<tom>"] == told["concepts"]
    told_of = ("method", "ridge", "max_rank")
    assert [told[name] for name in told_of] == [expected.report.data[name] for name in told_of]


def test_no_two_rows_of_the_table_make_the_same_pack() -> None:
    if len(MADE) < len(TABLE):
        pytest.skip("the table was not run as a whole")
    packs = list(MADE.values())
    assert not any(alike(one, other) for number, one in enumerate(packs) for other in packs[:number])


@pytest.fixture
def asked(place, monkeypatch: pytest.MonkeyPatch, made: list[dict[str, Any]]) -> Any:
    """Runs the command up to where it would record and solve: what the fuser is asked for, and of which sources."""

    def fuse(self: GradientFuser, sources: Any, **given: Any) -> Any:
        made[-1] |= given | {"sources": [dict(source.prompts) for source in sources]}
        raise FusionError("enough")

    def run_up_to_there(*arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        monkeypatch.chdir(place)
        with pytest.raises(FusionError, match="enough"):
            run(*arguments)
        (settings,) = made
        return settings, settings.pop("sources")

    monkeypatch.setattr(GradientFuser, "fuse", fuse)
    return run_up_to_there


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        *((("--method", method.value), {"method": method.value}) for method in Method),
        (("--device", "cpu:0"), {"device": "cpu:0"}),
        (("--base", "base"), IN_ORDER),
    ],
    ids=lambda each: " ".join(each),
)
def test_what_takes_long_is_asked_for_as_well(asked, tmp_path, options, settings) -> None:
    told, sources = asked("rex", "tom", *options, "--output", str(tmp_path / "both"))
    assert told == USUAL | settings
    assert [list(prompts) for prompts in sources] == [["<rex>"], ["<tom>"]]


def test_sources_without_statistics_are_recorded_in_the_papers_order_with_their_own_base(
    place, asked, tmp_path
) -> None:
    for name in ("rex", "bare"):
        pack = EDLoRA.from_pretrained(place / name)
        replace(pack, base_model=str(place / "base")).save_pretrained(tmp_path / name)
    told, _ = asked(str(tmp_path / "rex"), str(tmp_path / "bare"), "--output", str(tmp_path / "both"))
    assert told == USUAL | IN_ORDER


def test_plain_loras_are_recorded_with_their_own_prompts(asked, tmp_path) -> None:
    texts = ("--prompts", "photo of sks dog |  sks dog, asleep")
    _, sources = asked("rex", "dog.safetensors", *texts, "--base", "base", "--output", str(tmp_path / "both"))
    assert sources[1] == {"dog": ("photo of sks dog", "sks dog, asleep")}


def test_options_of_the_result(place, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(place)
    output, sheet = tmp_path / "both", tmp_path / "map.png"
    asked = ("rex", "tom", "--output", str(output))
    told = run(*asked).partition(f"Wrote the fused pack of <rex>, <tom> to {output}\n")[2].splitlines()
    assert told[0] == "Draw two of them, each in its half of the picture, and measure what the pack keeps of each:"
    assert told[1].startswith(f"  mixofshow sample --concepts {output} --prompt ")
    assert all(f"--region '{place}:a <{name}>, in a meadow'" in told[1] for place, name in HALVES.items())
    assert told[2:] == [f"  mixofshow evaluate {output} --own rex --own tom"]
    for line in told[1:]:
        program, verb, *given = shlex.split(line)
        assert program == "mixofshow"
        assert {each for each in given if each.startswith("--")} <= options_of(verb)
    files = {path.name for path in output.iterdir()}
    assert files == {"edlora.safetensors", "README.md"}
    with pytest.raises(OverwriteError, match=r"edlora\.safetensors"):
        run(*asked, "--heat-map", str(sheet))
    before = (output / "edlora.safetensors").read_bytes()
    plan = json.loads(run(*asked, "--dry-run", "--json", "--weight", "3", "--weight", "1"))
    assert plan["replaces"].endswith("; asks for --overwrite")
    assert plan["writes"] == str(output)
    planned = json.loads(run(*asked, "--dry-run", "--json", "--heat-map", str(sheet)))
    assert planned["writes"] == f"{output}, {sheet}"
    assert not sheet.exists()
    options = ("--heat-map", str(sheet), "--weight", "3", "--weight", "1", "--keep-sources")
    assert f" to {output}\nWrote {sheet}\n" in run(*asked, "--overwrite", *options)
    assert (output / "edlora.safetensors").read_bytes() != before
    assert sheet.read_bytes().startswith(b"\x89PNG")
    kept = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()} - files
    assert {f"sources/{name}/edlora.safetensors" for name in ("rex", "tom")} <= kept
    assert {f"sources/{name}/edlora.statistics.safetensors" for name in ("rex", "tom")} <= kept


def test_every_option_of_fuse_is_in_one_of_these_tests() -> None:
    alone = {"--output", "--keep-sources", "--heat-map", "--overwrite", "--dry-run", "--json", "--prompts", "--device"}
    assert named_in(*(options for options, _ in TABLE)) | alone | {"sources"} == options_of("fuse")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prior", "nan"), "--prior must be a number of 0 or more, got nan"),
        (("--prior", "-3"), "--prior must be a number of 0 or more, got -3"),
    ],
)
def test_a_prior_that_is_no_weight_is_refused(place, monkeypatch, tmp_path, options, said) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        run("rex", "tom", *options, "--output", str(tmp_path / "both"), "--dry-run")


@pytest.mark.parametrize("given", [("--prior", "0.1"), ("--ridge", "auto"), ("--features", "own")], ids=" ".join)
def test_what_has_no_effect_on_a_method_is_told(place, monkeypatch, tmp_path, given) -> None:
    monkeypatch.chdir(place)
    with pytest.warns(MixOfShowWarning, match=f"Without effect: {given[0]}; --method average records no features"):
        CliRunner().invoke(
            cli.app,
            ["fuse", "rex", "tom", "--method", "average", *given, "--output", str(tmp_path / "both"), "--dry-run"],
            catch_exceptions=False,
        )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('source = ["dog"]', "source 1: must be a table, got 'dog'"),
        ('[[source]]\npath = "x"\nprompts = 5', "source 1: prompts must be list, got 5"),
        (
            '[[source]]\npath = "x"\nweight = 0\nscale = nan\n[[source]]\npath = "y"\nweight = inf\n',
            "s.toml: source 1: weight must be finite and above 0, got 0; source 1: scale must be finite, got nan; "
            "source 2: weight must be finite and above 0, got inf.",
        ),
        ('[[source]]\npath = "x"\nscale = -inf\nweight = -2.5', "weight must be finite and above 0, got -2.5"),
        (f'[[source]]\npath = "x"\nscale = {10**400}', "source 1: scale must be finite, got 1000"),
    ],
)
def test_a_list_of_sources_of_other_types_is_refused(tmp_path, text, said) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        run(str(tmp_path / "s.toml"), "--output", str(tmp_path / "both"))
