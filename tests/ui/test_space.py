"""The folder for a Space is one that the Hub starts, and that this package can be installed for."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_its_readme_tells_the_hub_how_to_start_it() -> None:
    told = yaml.safe_load((SPACE / "README.md").read_text("utf-8").split("---")[1])
    assert (told["sdk"], told["app_file"], told["license"]) == ("gradio", "app.py", "apache-2.0")
    gradio = {asked.name: asked for asked in map(Requirement, EXTRAS["ui"])}["gradio"]
    assert told["sdk_version"] in gradio.specifier
    assert len(told["short_description"]) <= 60


def test_it_asks_for_this_package() -> None:
    asked = Requirement((SPACE / "requirements.txt").read_text().strip())
    assert (asked.name, asked.extras) == ("diffusers-mixofshow", {"ui"})


@pytest.mark.parametrize("lends", [True, False])
def test_it_is_the_page_and_lets_drawing_and_fusing_borrow_a_gpu(lends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    lent: list[str] = []
    spaces = ModuleType("spaces")
    spaces.GPU = lambda function: lent.append(function.__name__) or function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spaces", spaces if lends else None)
    app: dict = {"__name__": "app"}
    exec(compile((SPACE / "app.py").read_text("utf-8"), "app.py", "exec"), app)
    assert lent == (["_draw", "fuse"] if lends else [])
    assert not app["studio"].local
    assert {"/draw", "/fuse", "/load_files", "/look_into_file"} <= app["demo"].get_api_info()["named_endpoints"].keys()
