"""The commands that made the shipped base: written where people look for them, and there in a checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.toyland_base.quality import introduction
from diffusers_mixofshow import toyland
from diffusers_mixofshow.errors import MixOfShowError
from diffusers_mixofshow.toyland import base


ROOT = Path(__file__).parents[2]
TRAIN, GRADE, GRADE_BASES = (f"benchmarks.toyland_base.{name}" for name in ("train", "quality", "bases_quality"))
COMMANDS = {TRAIN, GRADE, GRADE_BASES}
PAGES = {
    "src/diffusers_mixofshow/toyland/weights/README.md": {TRAIN, GRADE},
    "bases/src/diffusers_mixofshow_bases/toyland_sd3/README.md": {TRAIN, GRADE_BASES},
    "bases/src/diffusers_mixofshow_bases/toyland_xl/README.md": {TRAIN, GRADE_BASES},
    "CONTRIBUTING.md": COMMANDS,
}


def commands_in(text: str) -> list[str]:
    """The modules that a text says to run."""
    return re.findall(r"-m\s+(benchmarks\.[\w.]+)", text)


def test_the_readme_of_the_weights_tells_how_they_were_trained() -> None:
    assert (
        (toyland.path() / "README.md").read_text(encoding="utf-8").startswith("\n".join(introduction(toyland.path())))
    )


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_the_commands_that_train_and_grade(page: str) -> None:
    assert set(commands_in((ROOT / page).read_text(encoding="utf-8"))) == PAGES[page]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_runs_in_a_checkout(command: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    arguments = [sys.executable, "-m", command, "--help"]
    result = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"usage: python -m {command} " in " ".join(result.stdout.split())  # broken where it is long


def test_a_package_without_its_weights_says_how_to_get_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "location_of", lambda name: str(tmp_path))
    with pytest.raises(MixOfShowError, match=r"holds no weights.*in a checkout") as caught:
        toyland.path()
    assert commands_in(str(caught.value)) == ["benchmarks.toyland_base.train"]
