"""Sources of `sample` and `fuse` that get in each other's way: told before anything is drawn, solved or replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import packs
import tiny
from diffusers_mixofshow import cli
from diffusers_mixofshow.errors import ConceptError


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
