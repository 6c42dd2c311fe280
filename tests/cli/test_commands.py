"""The command line as its users meet it: help, errors, exit codes, and the verbs on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import packs
import tiny
from cli.commands import VERBS, run
from diffusers_mixofshow import cli
from diffusers_mixofshow.cli.region_text import parse_region
from diffusers_mixofshow.cli.sample import number_files
from diffusers_mixofshow.cli.train import make_config
from diffusers_mixofshow.errors import ConfigurationError, FusionError, MixOfShowError, MixOfShowWarning, RegionError
from diffusers_mixofshow.regions import Layout, Region


RUN = (sys.executable, "-c", "from diffusers_mixofshow.cli import main; main()")


@pytest.fixture
def tiny_base(tmp_path: Path) -> Path:
    """A folder with a tiny pipeline."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path / "base"
    StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_in_its_help(verb: str) -> None:
    result = CliRunner().invoke(cli.app, [verb, "--help"])
    assert result.exit_code == 0
    assert f"mixofshow {verb}" in " ".join(result.output.split())


def test_libraries_keep_their_notes_to_themselves_unless_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{library}_VERBOSITY" for library in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB")]
    monkeypatch.setattr(sys, "argv", ["mixofshow", "--version"])
    for given in ("", "info"):
        for name in names:
            monkeypatch.setenv(name, given)
            if not given:
                monkeypatch.delenv(name)
        with pytest.raises(SystemExit):
            cli.main()
        assert [os.environ[name] for name in names] == [given or "error"] * 3


def test_a_fault_of_ours_is_an_ordinary_traceback_without_the_values_of_variables() -> None:
    """It can be pasted into a report: no frames drawn around it, no prompts or tokens of the user's in it."""
    script = """
from diffusers_mixofshow import cli

@cli.app.command()
def broken():
    1 / 0

cli.main()
"""
    result = subprocess.run((sys.executable, "-c", script, "broken"), capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_help_imports_no_heavy_module(option: str) -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom diffusers_mixofshow import cli\n"
        f"result = CliRunner().invoke(cli.app, ['train', '{option}'])\n"
        "print(result.exit_code, [name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.split("\n")[0] == "0 []"


def test_an_error_of_ours_is_one_line_on_standard_error() -> None:
    command = [*RUN, "inspect", "/no/such/file"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == cli.WRONG_USE
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("fuse", "--nonsense"), "--nonsense. See 'mixofshow fuse --help'."),
        (("smaple",), "Did you mean 'sample'? See 'mixofshow --help'."),
        (("sample", "--steps", "many", "--prompt", "x"), "'--steps'"),
        (("sample", "--steps", "1001", "--prompt", "x"), "1000"),
        (("inspect",), "Missing argument"),
        (("sample", "--concepts", "a", "b", "--prompt", "x"), "repeat the option: --concepts ONE --concepts OTHER."),
        (("sample", "--base", "toylnd", "--prompt", "x"), "Did you mean 'toyland'?"),
        (("sample", "--base", "toyland", "--prompt", "x", "--region", "3,2"), "left,top,right,bottom:prompt"),
        (("sample", "--base", "toyland", "--prompt", "a <rex>", "--dry-run"), "<rex>"),
        (("sample", "--base", "toyland", "--prompt", "a cat", "--refine", "--dry-run"), "without any region"),
        (("sample", "--base", "toyland", "--prompt", "x", "--output", "x.gifx", "--dry-run"), "ends in .png"),
        (("sample", "--base", "toyland", "--prompt", "x", "--output", "."), "expected a file that ends in"),
        (("sample", "--base", "toyland", "--prompt", "x", "--width", "65"), "a width of 65 pixels"),
        (("sample", "--base", "toyland", "--prompt", "x", "--guidance", "nan"), "--guidance nan"),
        (("inspect", f"{Path(__file__).parent}/test_comands.py"), "test_commands.py"),
        (("fuse", "a", "b", "--output", str(Path(__file__))), "is a file"),
        (("sample", "--concepts", "/no/such/file", "--prompt", "x"), "/no/such/file does not exist"),
        (("demo", "--photos", "/no/such/folder", "--class-word", "dog"), "/no/such/folder is no folder"),
        (("train", "/no/such/folder", "--concept", "rex", "--class-word", "dog", "--base", "toyland"), "no folder"),
    ],
)
def test_wrong_use_is_one_line_that_helps(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == cli.WRONG_USE
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert told in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "--base", "no/base", "--prompt", "x", "--output", "file/x.png"),
        ("fuse", "no/one", "no/other", "--output", "file/pack"),
        ("compare", "no/one", "--sheet", "file/x.png"),
        ("evaluate", "no/one", "--record", "file/x.json"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_cannot_be_written_is_noticed_before_anything_is_loaded(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == cli.FAILED
    assert result.stderr.startswith("Error: file/")
    assert "cannot be written: Not a directory" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("verb", [("--help",), ("doctor",), ("doctor", "--json")])
def test_a_standard_output_that_is_full_is_one_line(verb: tuple[str, ...]) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [*RUN, *verb], stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False
        )
    assert result.returncode == cli.FAILED
    assert "No space left on device" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("closed", [1, 2])
def test_a_standard_stream_that_is_closed_is_one_that_nobody_reads(closed: int) -> None:
    code = f"import os, sys\nos.close({closed})\nos.execv(sys.executable, {[*RUN, 'doctor', '--json']!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_reader_that_goes_away_ends_the_command_in_silence() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [*RUN, "doctor", "--json"], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, check=False
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (cli.FAILED, "")


def test_no_verb_shows_the_help() -> None:
    result = run()
    assert result.returncode == cli.WRONG_USE
    assert "Start with: mixofshow demo" in result.stdout + result.stderr
    assert "Error" not in result.stderr


def test_interrupting_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == cli.INTERRUPTED


def test_parse_region() -> None:
    region = parse_region("0, 0,0.5,1: a <potter>: smiling")
    assert region.box == (0.0, 0.0, 0.5, 1.0)
    assert region.prompt == "a <potter>: smiling"


@pytest.mark.parametrize("text", ["a <potter>", "0,0,1:a <potter>", "0,0,x,1:a", "__import__('os'),0,1,1:a"])
def test_parse_region_says_what_it_expects(text: str) -> None:
    with pytest.raises(RegionError, match="left,top,right,bottom:prompt"):
        parse_region(text)


def test_several_pictures_get_numbers() -> None:
    assert number_files(Path("x.png"), 1) == [Path("x.png")]
    assert number_files(Path("a/x.png"), 2) == [Path("a/x-0.png"), Path("a/x-1.png")]


def test_training_on_toyland_takes_its_settings_and_names_the_output() -> None:
    settings = {"instance_data_dir": "x", "concept": "<bobo>", "class_word": "critter"}
    config = make_config(settings | {"pretrained_model_name_or_path": "toyland"})
    assert (config.resolution, config.output_dir) == (64, Path("bobo"))
    with pytest.raises(ConfigurationError, match="'class_word' is missing"):
        make_config({"instance_data_dir": "x", "concept": "bobo"})


def test_train_reads_toml_and_refuses_unknown_settings(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('concept = "bobo"\nclass_word = "critter"\nrnak = 4\n')
    result = CliRunner().invoke(cli.app, ["train", "photos", "--config", str(file)])
    assert isinstance(result.exception, MixOfShowError)
    assert "did you mean 'rank'" in str(result.exception)


def test_inspect_shows_a_pack(tmp_path: Path) -> None:
    packs.random_pack(tiny.components(), "potter").save_pretrained(tmp_path)
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path), "--json"])
    summary = json.loads(result.output)
    assert [concept["placeholder"] for concept in summary["concepts"]] == ["<potter>"]
    assert summary["bytes"] == (tmp_path / "edlora.safetensors").stat().st_size
    table = CliRunner().invoke(cli.app, ["inspect", str(tmp_path)])
    assert "<potter>" in table.output


def test_fuse_and_sample_on_a_tiny_model(tmp_path: Path, tiny_base: Path) -> None:
    for name in ("potter", "hermione"):
        packs.random_pack(tiny.components(), name).save_pretrained(tmp_path / name)
    runner = CliRunner()
    sources = [str(tmp_path / name) for name in ("potter", "hermione")]
    fused = [*sources, "--base", str(tiny_base), "--output", str(tmp_path / "both"), "--method", "average"]
    result = runner.invoke(cli.app, ["fuse", *fused], catch_exceptions=False)
    assert "<potter>, <hermione>" in result.output
    picture = tmp_path / "out" / "castle.png"
    options = ["--concepts", str(tmp_path / "both"), "--base", str(tiny_base), "--prompt", "two people"]
    regions = ["--region", "0,0,0.5,1:a <potter>", "--region", "0.5,0,1,1:a <hermione>"]
    small = ["--output", str(picture), "--steps", "2", "--count", "2", "--width", "96"]
    result = runner.invoke(cli.app, ["sample", *options, *regions, *small], catch_exceptions=False)
    assert result.exit_code == 0
    assert sorted(path.name for path in picture.parent.iterdir()) == ["castle-0.png", "castle-1.png"]
    own = tiny.components()["unet"].config.sample_size * 2
    with Image.open(picture.with_name("castle-0.png")) as drawn:
        assert drawn.size == (96, own)  # diffusers alone would forget the width


def test_fuse_from_statistics_needs_no_base(tmp_path: Path) -> None:
    from diffusers_mixofshow import GradientFuser, MixOfShowPipeline

    fuser = GradientFuser(
        MixOfShowPipeline(**tiny.components(), requires_safety_checker=False),
        sequential=False,
        steps=1,
        prompts="<TOK>",
    )
    sources = [tmp_path / name for name in ("potter", "hermione")]
    for source in sources:
        packs.random_pack(tiny.components(), source.name).save_pretrained(source)
        fuser.record(source)
    arguments = [*map(str, sources), "--output", str(tmp_path / "both"), "--heat-map", str(tmp_path / "map.png")]
    result = CliRunner().invoke(
        cli.app, ["fuse", *arguments, "--weight", "2", "--weight", "1"], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "averaged" in result.output
    assert "about features, not identity" in " ".join(result.output.split())
    assert (tmp_path / "both" / "edlora.safetensors").exists()
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    (sources[0] / "edlora.statistics.safetensors").unlink()
    result = CliRunner().invoke(cli.app, ["fuse", *arguments, "--overwrite"])
    assert "base model 'someone/tiny' cannot be loaded" in str(result.exception)


def _plain_lora(path: Path) -> Path:
    from diffusers_mixofshow.interop.lora_files import write_lora

    return write_lora(path, dict(packs.random_pack(tiny.components(), "any", ranks=(2,)).lora))


def test_fuse_takes_plain_loras_with_prompts_and_lists_of_sources(tmp_path: Path, tiny_base: Path) -> None:
    files = [str(_plain_lora(tmp_path / f"{name}.safetensors")) for name in ("dog", "ink")]
    packs.random_pack(tiny.components(), "potter", ranks=(2,)).save_pretrained(tmp_path / "potter")
    common = ["--base", str(tiny_base), "--method", "average", "--output"]
    asked = ["--prompts", "photo of sks dog | sks dog", "--prompts", "a castle, ink"]
    runner = CliRunner()
    fused = ["fuse", *files, *asked, *common, str(tmp_path / "both")]
    assert "concepts: dog, ink\n" in runner.invoke(cli.app, [*fused, "--dry-run"], catch_exceptions=False).stdout
    result = runner.invoke(cli.app, fused, catch_exceptions=False)
    assert "Wrote the fused pack of dog, ink to" in result.output
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [
        "README.md",
        "pytorch_lora_weights.safetensors",
    ]
    listed = tmp_path / "sources.toml"
    tables = ['[[source]]\npath = "potter"\nweight = 2\n']
    tables.append('[[source]]\npath = "dog.safetensors"\nprompts = ["sks dog"]\nname = "rex"\nscale = 0.5\n')
    listed.write_text("\n".join(tables))
    mixed = runner.invoke(cli.app, ["fuse", str(listed), *common, str(tmp_path / "mixed")], catch_exceptions=False)
    assert "Wrote the fused pack of <potter>, rex to" in mixed.output
    assert (tmp_path / "mixed" / "edlora.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[source]]\npath = "dog.safetensors"\n', "is a plain LoRA: add prompts"),
        ("[[source]]\nprompts = [1]\nwait = 2\n", "unknown key 'wait'.*prompts must be strings.*path is missing"),
        ('[[source]]\npath = "x"\nweight = true\n', "weight must be int or float, got True"),
        ("[other]\n", r"expected tables \[\[source\]\] and nothing else, got other"),
        ("=", "cannot be read as TOML"),
    ],
)
def test_fuse_says_what_is_wrong_with_a_list_of_sources(tmp_path: Path, text: str, message: str) -> None:
    _plain_lora(tmp_path / "dog.safetensors")
    (tmp_path / "list.toml").write_text(text)
    result = CliRunner().invoke(cli.app, ["fuse", str(tmp_path / "list.toml"), "--output", str(tmp_path / "out")])
    assert isinstance(result.exception, ConfigurationError)
    assert re.search(message, str(result.exception))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (["--weight", "1"], ConfigurationError, "--weight 1 times for 2 sources"),
        (["--ridge", "-1"], ConfigurationError, "0 or more, or 'auto', got '-1'"),
        (["--ridge", "much"], ConfigurationError, "0 or more, or 'auto', got 'much'"),
        (["--ridge", "much", "--dry-run"], ConfigurationError, "0 or more, or 'auto', got 'much'"),
        (["--device", "nowhere"], FusionError, "cannot be solved on device='nowhere'"),
    ],
)
def test_fuse_refuses_numbers_that_make_no_sense(
    tmp_path: Path, tiny_base: Path, options: list[str], kind: type[Exception], message: str
) -> None:
    for name in ("potter", "hermione"):
        packs.random_pack(tiny.components(), name).save_pretrained(tmp_path / name)
    sources = [str(tmp_path / "potter"), str(tmp_path / "hermione"), "--base", str(tiny_base)]
    with pytest.raises(kind, match=message):
        CliRunner().invoke(
            cli.app, ["fuse", *sources, "--output", str(tmp_path / "out"), *options], catch_exceptions=False
        )


def test_fuse_wants_prompts_for_each_plain_lora(tmp_path: Path) -> None:
    file = str(_plain_lora(tmp_path / "dog.safetensors"))
    result = CliRunner().invoke(cli.app, ["fuse", file, "--output", str(tmp_path / "out")])
    assert isinstance(result.exception, ConfigurationError)
    assert "Got --prompts 0 times for 1 plain LoRAs" in str(result.exception)


def test_fuse_asks_for_no_prompts_where_nothing_is_recorded(tmp_path: Path) -> None:
    files = [str(_plain_lora(tmp_path / f"{name}.safetensors")) for name in ("dog", "ink")]
    (tmp_path / "list.toml").write_text("".join(f"[[source]]\npath = '{file}'\n" for file in files))
    for number, given in enumerate((files, [str(tmp_path / "list.toml")])):
        asked = ["fuse", *given, "--method", "average", "--output", str(tmp_path / f"both-{number}")]
        with pytest.warns(MixOfShowWarning) as caught:
            result = CliRunner().invoke(cli.app, asked, catch_exceptions=False)
        assert "Wrote the fused pack of dog, ink to" in result.output
        assert sum("what calls dog, ink: the fused file" in str(one.message) for one in caught) == 1
    with pytest.raises(ConfigurationError, match="Got --prompts 1 times for 2 plain LoRAs"):
        CliRunner().invoke(cli.app, ["fuse", *files, *asked[2:], "--prompts", "a dog"], catch_exceptions=False)


def test_fuse_reads_every_file_once(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers_mixofshow.edlora import EDLoRA

    reads: list[str] = []
    read = EDLoRA.from_pretrained.__func__
    for name in ("potter", "hermione"):
        packs.random_pack(tiny.components(), name).save_pretrained(tmp_path / name)
    monkeypatch.setattr(
        EDLoRA,
        "from_pretrained",
        classmethod(lambda cls, path, **more: (reads.append(path), read(cls, path, **more))[1]),
    )
    sources = [str(tmp_path / name) for name in ("potter", "hermione")]
    options = ["--base", str(tiny_base), "--output", str(tmp_path / "both"), "--method", "average"]
    CliRunner().invoke(cli.app, ["fuse", *sources, *options], catch_exceptions=False)
    assert [str(path) for path in reads] == sources


@pytest.mark.parametrize("way", ["arguments", "list"])
def test_fuse_reads_files_of_other_programs_once(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    from diffusers_mixofshow.interop import convert, foreign

    convert(packs.random_pack(tiny.components(), "potter", ranks=(2,)), tmp_path / "potter.pth", "mix-of-show")
    lora = _plain_lora(tmp_path / "dog.safetensors")
    (tmp_path / "list.toml").write_text(
        "[[source]]\npath = 'potter.pth'\n[[source]]\npath = 'dog.safetensors'\nprompts = ['sks dog']\n"
    )
    reads: list[str] = []
    read = foreign._read_with_companions
    monkeypatch.setattr(
        foreign, "_read_with_companions", lambda path, beside: (reads.append(path.name), read(path, beside))[1]
    )
    given = [str(tmp_path / "potter.pth"), str(lora), "--prompts", "sks dog"]
    options = ["--base", str(tiny_base), "--output", str(tmp_path / "both"), "--method", "average"]
    with pytest.warns(MixOfShowWarning, match="it has no class word for <potter>") as caught:
        CliRunner().invoke(
            cli.app,
            ["fuse", *([str(tmp_path / "list.toml")] if way == "list" else given), *options],
            catch_exceptions=False,
        )
    assert sorted(reads) == ["dog.safetensors", "potter.pth"]
    assert sum("it has no class word for" in str(one.message) for one in caught) == 1


def test_a_base_that_does_not_exist_is_an_error_of_ours(tmp_path: Path) -> None:
    arguments = ["sample", "--base", str(tmp_path), "--prompt", "a castle"]
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, ConfigurationError)


def test_sample_wants_concepts_or_a_base() -> None:
    result = CliRunner().invoke(cli.app, ["sample", "--prompt", "a castle"])
    assert isinstance(result.exception, ConfigurationError)


def test_sample_draws_a_layout_and_options_go_before_it(tmp_path: Path, tiny_base: Path) -> None:
    from PIL import Image

    regions = (Region("a cat", box=(0, 0, 0.5, 1)),)
    plan = Layout(regions, prompt="two pets", width=48, height=32).save(tmp_path / "plan.json")
    options = ["--base", str(tiny_base), "--layout", str(plan), "--steps", "1", "--output", str(tmp_path / "x.png")]
    more = ["--region", "0.5,0,1,1:a dog", "--height", "16"]
    result = CliRunner().invoke(cli.app, ["sample", *options, *more], catch_exceptions=False)
    assert result.exit_code == 0
    assert Image.open(tmp_path / "x.png").size == (48, 16)


def test_sample_tells_files_and_settings_as_json(tmp_path: Path) -> None:
    options = ["--base", "toyland", "--prompt", "a cat", "--steps", "1", "--count", "2", "--seed", "5", "--json"]
    result = run("sample", *options, cwd=tmp_path)
    assert json.loads(result.stdout) == {
        "pictures": [{"file": "sample-0.png", "seed": 5}, {"file": "sample-1.png", "seed": 6}],
        "base": "toyland",
        "prompt": "a cat",
        "regions": 0,
        "steps": 1,
        "guidance": 3.0,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample-0.png", "sample-1.png"]
    assert re.fullmatch(r"Loading toyland \.\.\.\nSampling: 0/1 \[.*\]\nSampling: 1/1 \[.*\]\n", result.stderr)
    planned = json.loads(run("sample", *options, "--guidance", "1", "--dry-run", cwd=tmp_path).stdout)
    assert planned["U-Net runs"] == "1, each on a batch of 2"


def test_fuse_tells_its_report_as_json(tmp_path: Path) -> None:
    for name in ("potter", "hermione"):
        packs.random_pack(tiny.components(), name).save_pretrained(tmp_path / name)
    options = ("potter", "hermione", "--output", "both", "--method", "average", "--json")
    planned = json.loads(run("fuse", *options, "--dry-run", cwd=tmp_path).stdout)
    assert planned["concepts"] == "<potter>, <hermione>"
    assert not (tmp_path / "both").exists()
    told = json.loads(run("fuse", *options, cwd=tmp_path).stdout)
    assert (told["output"], told["concepts"], told["method"]) == ("both", ["<potter>", "<hermione>"], "average")


def test_sample_wants_a_prompt(tmp_path: Path) -> None:
    plan = Layout().save(tmp_path / "plan.json")
    for options in ([], ["--layout", str(plan)]):
        result = CliRunner().invoke(cli.app, ["sample", "--base", str(tmp_path), *options])
        assert isinstance(result.exception, ConfigurationError)
        assert "--prompt" in str(result.exception)
