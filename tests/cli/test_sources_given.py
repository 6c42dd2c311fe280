"""Sources of `sample` and `fuse` that get in each other's way: told before anything is drawn, solved or replaced."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import packs
import tiny
from diffusers_mixofshow import EDLoRA, GradientFuser, MixOfShowPipeline, cli
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, FusionError, MixOfShowWarning, OverwriteError
from diffusers_mixofshow.fusion.pack import read_plain_pack
from diffusers_mixofshow.interop import write_lora


@pytest.fixture(scope="module")
def here(place: Path) -> Path:
    """The folder of `place`, with packs that share names with `rex`."""
    components = tiny.components()
    packs.random_pack(components, "rex", seed=1).save_pretrained(place / "again")
    packs.random_pack(components, "rex1", seed=1).save_pretrained(place / "token")
    packs.random_pack(components, "tom", "rex", seed=2).save_pretrained(place / "both")
    return place


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        (("rex", "again"), "<rex>"),
        (("again", "rex", "tom"), "<rex>"),
        (("rex", "./rex"), "<rex>"),
        (("rex", "rex/edlora.safetensors"), "<rex>"),
        (("both", "rex"), "<rex>"),
        (("both", "rex", "tom"), "<rex>, <tom>"),
        (("rex", "token"), "<rex1> (of <rex> and <rex1>)"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("plan", [(), ("--dry-run",)], ids=["run", "plan"])
@pytest.mark.parametrize("verb", ["sample", "fuse"])
def test_names_used_twice_are_told_alike(
    here: Path, verb: str, plan: tuple[str, ...], sources: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    given = sources if verb == "fuse" else [word for source in sources for word in ("--concepts", source)]
    more = ("--output", "fused") if verb == "fuse" else ("--prompt", "a <rex>", "--output", "new.png")
    result = CliRunner().invoke(cli.app, [verb, *given, "--base", "no/base", *more, *plan])
    assert isinstance(result.exception, ConceptError)
    assert isinstance(result.exception, cli._MISUSES)
    assert str(result.exception) == f"Names used twice: {told}. Give each concept once, or rename one of them."
    assert not (here / "fused").exists()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two ED-LoRAs with statistics, one without, and a pack that carries its sources."""
    folder = tmp_path_factory.mktemp("published")
    pipe = MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "base")
    fuser = GradientFuser(pipe, steps=1, prompts=("a <TOK>", "two <TOK>"), sequential=False)
    for seed, name in enumerate(("rex", "kit", "bare")):
        pack = packs.random_pack(pipe.components, name, ranks=(1,), seed=seed)
        replace(pack, base_model=str(folder / "base")).save_pretrained(folder / name)
        if name != "bare":
            fuser.record(folder / name)
    GradientFuser().fuse([folder / "rex", folder / "kit"]).save_pretrained(folder / "pack", sources=True)
    write_lora(folder / "plain" / "pytorch_lora_weights.safetensors", pack.lora)
    (folder / "half.toml").write_text("[[source]]\npath = 'pack/sources/rex'\nscale = 0.5\n[[source]]\npath = 'bare'")
    (folder / "link").symlink_to("rex")
    return folder


def run(*arguments: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("always", MixOfShowWarning)
        result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "lost"),
    [
        (("rex", "kit", "--output", "rex"), "rex"),
        (("rex", "kit", "--output", "./kit"), "kit"),
        (("rex/edlora.safetensors", "kit", "--output", "rex"), "rex/edlora.safetensors"),
        (("link", "kit", "--output", "rex"), "link"),
        (("rex", "kit", "--output", "link"), "rex"),
        (("rex", "--output", "rex"), "rex"),
        (("pack", "bare", "--output", "pack"), "pack"),
        (("half.toml", "--output", "pack"), "pack/sources/rex"),
        (("half.toml", "--output", "pack", "--keep-sources"), "pack/sources/rex"),
        (("plain", "--prompts", "a dog", "--output", "plain"), "plain"),
        (("rex", "kit", "--output", "new", "--heat-map", "kit/edlora.safetensors"), "kit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_no_source_is_lost_to_its_own_fusion(
    published: Path, arguments: tuple[str, ...], lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(published)
    before = contents(published)
    for more in ((), ("--dry-run",), ("--overwrite",), ("--overwrite", "--dry-run")):
        with pytest.raises(OverwriteError, match=f"would replace its own source: {lost}. Choose another place"):
            run("fuse", *arguments, "--base", "base", *more)
    assert contents(published) == before


def test_a_list_may_say_where_statistics_lie_beside_it(published: Path, tmp_path: Path) -> None:
    """They are found from the list's folder, wherever the command is typed."""
    for name in ("rex", "kit"):
        shutil.copytree(published / name, tmp_path / name)
        (moved,) = (tmp_path / name).glob("*statistics*")
        moved.rename(tmp_path / f"{name}-seen.safetensors")
    tables = (f"[[source]]\npath = '{name}'\nstatistics = '{name}-seen.safetensors'\n" for name in ("rex", "kit"))
    (tmp_path / "list.toml").write_text("".join(tables))
    run("fuse", str(tmp_path / "list.toml"), "--output", str(tmp_path / "both"))
    expected = GradientFuser().fuse([published / "rex", published / "kit"])
    assert EDLoRA.from_pretrained(tmp_path / "both").lora.keys() == expected.lora.keys()


def test_a_source_that_is_carried_along_is_not_lost(published: Path, tmp_path: Path) -> None:
    shutil.copytree(published / "rex", tmp_path / "rex")
    run(
        "fuse",
        str(tmp_path / "rex"),
        str(published / "kit"),
        "--output",
        str(tmp_path / "rex"),
        "--overwrite",
        "--keep-sources",
    )
    carried = EDLoRA.from_pretrained(tmp_path / "rex" / "sources" / "rex")
    assert carried.digest == EDLoRA.from_pretrained(published / "rex").digest


def test_sources_that_cannot_be_carried_are_told_before_the_fusion(published: Path, tmp_path: Path) -> None:
    for name in ("a&b", "a,b"):
        shutil.copy(published / "plain" / "pytorch_lora_weights.safetensors", tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("a&b", "a,b")]
    asked = [*files, "--prompts", "a", "--prompts", "b", "--base", "no/base", "--output", str(tmp_path / "new")]
    with pytest.raises(FusionError, match="one folder for a&b and a,b"):
        run("fuse", *asked, "--keep-sources", "--dry-run")


def test_a_pack_may_be_fused_anew_from_the_sources_that_it_carries(published: Path, tmp_path: Path) -> None:
    shutil.copytree(published / "pack", tmp_path / "pack")
    carried = [str(tmp_path / "pack" / "sources" / name) for name in ("rex", "kit")]
    kept = contents(tmp_path / "pack" / "sources")
    run("fuse", *carried, "--weight", "3", "--weight", "1", "--output", str(tmp_path / "pack"), "--overwrite")
    assert contents(tmp_path / "pack" / "sources") == kept


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("rex", "kit"), []),
        (("rex", "kit", "--features", "own"), []),
        (("rex", "bare", "--features", "own"), []),
        (("rex", "kit", "--features", "sequential"), []),
        (("rex", "bare", "--method", "average"), []),
        (("rex", "bare"), ["the statistics beside <rex> are not used: as for <bare> there are none that fit, all"]),
        (
            ("kit", "bare", "rex"),
            ["the statistics beside <kit>, <rex> are not used: as for <bare> there are none that fit"],
        ),
        (("rex", "kit", "--base", "base"), ["the statistics beside <rex>, <kit> are not used: as --base or --prior"]),
        (("rex", "kit", "--prior", "0.1"), ["the statistics beside <rex>, <kit> are not used: as --base or --prior"]),
        (("rex", "kit", "--keep-sources"), []),
        (("rex", "bare", "--features", "own", "--keep-sources"), []),
        (("rex", "bare", "--method", "average", "--keep-sources"), []),
        (
            ("rex", "kit", "--features", "sequential", "--keep-sources"),
            ["<rex>, <kit> will be fused in stages, whose statistics hold for these sources together"],
        ),
        (("rex",), ["<rex> is the only source"]),
        (("pack", "--method", "average"), ["<rex>+<kit> is the only source"]),
        (("bare",), ["<bare> is the only source"]),
        (("plain", "--prompts", "a dog", "--base", "base"), ["plain is the only source"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_given_in_vain_is_told(
    published: Path, arguments: tuple[str, ...], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(published)
    with warnings.catch_warnings(record=True) as caught:
        run("fuse", *arguments, "--output", "new", "--dry-run")
    ours = [str(one.message) for one in caught if issubclass(one.category, MixOfShowWarning)]
    assert len(ours) == len(told)
    assert all(text.startswith(start) for text, start in zip(ours, told, strict=True))


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (("dog in snow", "ink style"), ""),
        (("ink style", "dog in snow"), "dog is named by the prompts of ink, but not by its own; ink is named by the "),
        (("a castle, INK", "a dog"), "dog is named by the prompts of ink, but not by its own; ink is named"),
        (("a castle", "a hotdog stand, ink"), ""),
        (("a castle", "a dog, ink"), "dog is named by the prompts of ink, but not by its own. --prompts go by the"),
        (("a dog in ink", "ink"), ""),
        (("a", "b"), ""),
    ],
)
def test_prompts_in_another_order_than_the_files_are_told(
    published: Path, tmp_path: Path, prompts: tuple[str, str], told: str
) -> None:
    for name, start in (("dog", 0), ("ink", 1)):
        pack = packs.random_pack(tiny.components(), ranks=(1,), seed=start)
        write_lora(tmp_path / f"{name}.safetensors", pack.lora)
    files = [str(tmp_path / f"{name}.safetensors") for name in ("dog", "ink")]
    asked = [*files, *(part for text in prompts for part in ("--prompts", text)), "--base", str(published / "base")]
    with warnings.catch_warnings(record=True) as caught:
        run("fuse", *asked, "--output", str(tmp_path / "both"), "--dry-run")
    ours = [str(one.message) for one in caught if issubclass(one.category, MixOfShowWarning)]
    assert len(ours) == (1 if told else 0)
    assert all(text.startswith(told) for text in ours)


@pytest.mark.parametrize(
    ("arguments", "is_told"),
    [
        (("pack", "bare"), True),
        (("pack", "bare", "--weight", "1", "--weight", "1"), False),
        (("pack",), False),
        (("rex", "bare"), False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_pack_of_several_is_said_to_count_as_one(published: Path, monkeypatch, arguments, is_told) -> None:
    monkeypatch.chdir(published)
    asked = ("fuse", *arguments, "--method", "average", "--output", "new", "--dry-run", "--json")
    (line, *others) = json.loads(run(*asked))["sources"]
    told = "; it counts as one of the sources: --weight 2 --weight 1 gives each of its 2 the weight of one"
    assert line.endswith(told) == is_told
    assert not any("counts as one" in other for other in others)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("rex/sources/kit", "the pack 'rex' keeps no sources. Expected one that was fused with --features own --keep"),
        ("nowhere/sources/kit", "does not exist"),
    ],
)
def test_a_source_of_a_pack_that_keeps_none_says_how_to_keep_them(published: Path, monkeypatch, source, told) -> None:
    monkeypatch.chdir(published)
    result = CliRunner().invoke(cli.app, ["fuse", source, "kit", "--output", "new"])
    assert isinstance(result.exception, cli._MISUSES)
    assert told in str(result.exception)


def test_a_pack_that_carries_its_sources_is_said_to_be_changed_by_them(published: Path, monkeypatch, tmp_path) -> None:
    """Fused again from the sources that it carries, with another one or without one, from statistics alone."""
    monkeypatch.chdir(tmp_path)
    names = {name: str(published / name) for name in ("rex", "kit", "bare", "pack")}
    run("fuse", names["rex"], names["kit"], "--features", "own", "--keep-sources", "--output", "pair")
    average = ("--method", "average", "--output", "new", "--dry-run", "--json")
    (pair, _) = json.loads(run("fuse", "pair", names["bare"], *average))["sources"]
    assert "; to add or leave out one, fuse its sources instead, pair/sources/*; it counts" in pair
    (alone,) = json.loads(run("fuse", "pair", *average))["sources"]
    assert alone.endswith("pair/sources/*"), "who fuses a pack alone wants to leave out a concept"
    run("fuse", "pair/sources/rex", "pair/sources/kit", "--output", "again")
    assert EDLoRA.from_pretrained("again").digest == EDLoRA.from_pretrained("pair").digest
    plan = json.loads(run("fuse", "pair/sources/kit", "pair/sources/rex", "--output", "x", "--dry-run", "--json"))
    assert plan["base model"] == "none is needed"


def test_what_is_given_in_vain_is_told_once(published: Path, tmp_path: Path) -> None:
    with pytest.warns(MixOfShowWarning, match="<rex> is the only source") as caught:
        run("fuse", str(published / "rex"), "--output", str(tmp_path / "new"))
    assert len(caught) == 1


def _write_plain(folder: Path, *names: str) -> list[str]:
    """Plain LoRAs of the published base as files."""
    loras = [packs.random_pack(tiny.components(), ranks=(1,), seed=seed).lora for seed in range(len(names))]
    return [str(write_lora(folder / f"{name}.safetensors", lora)) for name, lora in zip(names, loras, strict=True)]


def test_a_pack_of_plain_loras_is_changed_by_the_sources_that_it_carries(published, monkeypatch, tmp_path) -> None:
    """As a pack of ED-LoRAs: what it carries knows its name, prompts, base and statistics, another is asked for."""
    monkeypatch.chdir(tmp_path)
    pair, base = _write_plain(tmp_path, "dog", "ink"), str(published / "base")
    asked = ("--prompts", "sks dog | a sks dog", "--prompts", "ink style", "--base", base)
    run("fuse", *pair, *asked, "--features", "own", "--keep-sources", "--output", "pair")
    kept = sorted(str(path) for path in Path("pair/sources").iterdir())
    assert [Path(path).name for path in kept] == ["dog", "ink"]
    again = ("fuse", *kept, "--output", "again")
    plan = json.loads(run(*again, "--dry-run", "--json"))
    assert plan["base model"] == "none is needed"
    assert plan["concepts"] == "dog, ink"
    assert not any("fused from" in line for line in plan["sources"])
    run(*again)
    assert read_plain_pack("again").digest == read_plain_pack("pair").digest
    (cat,) = _write_plain(tmp_path, "cat")
    more = ("fuse", *kept, cat, "--features", "own", "--output", "more", "--dry-run", "--json")
    plan = json.loads(run(*more, "--prompts", "ohwx cat"))
    assert (plan["concepts"], plan["base model"].partition(",")[0]) == ("dog, ink, cat", base)
    with pytest.raises(ConfigurationError, match=r"0 times for 1 plain LoRAs \(.*cat\.safetensors\)"):
        run(*more)


def test_plain_loras_that_are_fused_in_stages_are_carried_with_their_base(published, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    base = str(published / "base")
    asked = ("--prompts", "sks dog", "--prompts", "ink style", "--base", base, "--keep-sources", "--output", "pair")
    run("fuse", *_write_plain(tmp_path, "dog", "ink"), *asked)
    plan = json.loads(run("fuse", "pair/sources/dog", "pair/sources/ink", "--output", "x", "--dry-run", "--json"))
    assert (plan["concepts"], plan["base model"].partition(",")[0]) == ("dog, ink", base)
