"""The package as installed: version, public names, cost of importing it, and what its files promise each other."""

from __future__ import annotations

import ast
import importlib.metadata
import logging
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import diffusers_mixofshow
from diffusers_mixofshow.lazy import import_lazily


ROOT = Path(__file__).parents[1]
PACKAGE = Path(diffusers_mixofshow.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_the_version_is_the_one_that_is_installed() -> None:
    assert importlib.metadata.version("diffusers-mixofshow") == diffusers_mixofshow.__version__


def test_the_changelog_knows_the_version() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == diffusers_mixofshow.__version__


@pytest.mark.parametrize("name", diffusers_mixofshow.__all__)
def test_public_name_can_be_imported(name: str) -> None:
    value = getattr(diffusers_mixofshow, name)
    assert value.__name__.removeprefix("diffusers_mixofshow.") == name
    assert value.__doc__


def test_public_names_are_listed_once_for_people_for_type_checkers_and_for_the_lazy_import() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and str(node.module).startswith("diffusers_mixofshow.")
        and node.module != "diffusers_mixofshow.lazy"
        for alias in node.names
    }
    lazy = {
        name: f"diffusers_mixofshow.{module}"
        for module, names in diffusers_mixofshow._MODULES.items()
        for name in names
    }
    modules = {alias.name for node in ast.walk(tree) if _is_of_package(node) for alias in node.names}
    assert typed == lazy
    assert modules == {"errors", "interop", "toyland"} <= diffusers_mixofshow._MODULES.keys()
    assert sorted(diffusers_mixofshow.__all__) == sorted([*lazy, *modules])
    assert set(diffusers_mixofshow.__all__) <= set(dir(diffusers_mixofshow))


def _is_of_package(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "diffusers_mixofshow"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'diffusers_mixofshow' has no attribute 'GradientFusor'"):
        _ = diffusers_mixofshow.GradientFusor


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "diffusers", "transformers", "peft", "PIL", "typer", "rich"}
    imported = run_python("import sys, diffusers_mixofshow; print(*{m.split('.')[0] for m in sys.modules})").split()
    assert not heavy & set(imported)


def test_importing_every_public_name_says_nothing() -> None:
    code = "import diffusers_mixofshow as package; print(*(getattr(package, name) for name in package.__all__))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.startswith("<class")
    assert found.stderr == ""


def test_a_lazy_import_hushes_the_hint_of_torchvision_and_nothing_else(tmp_path, monkeypatch) -> None:
    told = logging.getLogger("transformers.utils.import_utils")
    heard: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())
    (tmp_path / "__init__.py").touch()
    (tmp_path / "talkative.py").write_text(
        f"import logging\nlogger = logging.getLogger({told.name!r})\n"
        "logger.warning('`X` requires torchvision (not installed)')\nlogger.warning('mind the step')\nX = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path.parent))
    told.addHandler(listener)
    try:
        assert import_lazily(tmp_path.name, {"talkative": ["X"]})("X") == 1
        told.warning("`Y` requires torchvision")
    finally:
        told.removeHandler(listener)
    assert heard == ["mind the step", "`Y` requires torchvision"]


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_the_console_script_is_the_command_line_of_the_package() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="mixofshow")
    assert callable(script.load())


def test_the_oldest_constraints_are_the_floors_of_the_dependencies() -> None:
    oldest = pins("oldest")
    floors = {}
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        bounds = {specifier.operator: Version(specifier.version) for specifier in requirement.specifier}
        assert bounds.keys() in ({">="}, {">=", "<"}), text
        floors[canonicalize_name(requirement.name)] = bounds[">="]
    assert floors.pop("torch") <= oldest["torch"] == Version("2.13.0")
    assert {name: oldest[name] for name in floors} == floors


@pytest.mark.parametrize("name", ["current", "oldest", "ui"])
def test_the_constraints_satisfy_the_requirements_and_pin_the_tested_torch(name: str) -> None:
    pinned = pins(name)
    assert pinned["torch"] == Version("2.13.0")
    extras = PROJECT["optional-dependencies"]
    for text in PROJECT["dependencies"] + extras["dev"] + (extras["ui"] if name == "ui" else []):
        requirement = Requirement(text)
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_the_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    commands = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= commands
    assert commands <= targets


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", diffusers_mixofshow.__all__)
def test_every_public_name_is_in_the_documentation(name: str) -> None:
    told = [page for page in PAGES if page.name != "api.md"]  # which is a list made of the docstrings
    assert any(re.search(rf"\b{name}\b", page.read_text()) for page in told)


def test_the_page_of_public_names_is_of_today_and_has_every_name_that_the_documentation_imports() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert text == runpy.run_path(str(ROOT / "docs" / "list_public_names.py"))["page"]()
    listed = {
        (module, name)
        for module, table in re.findall(r"^## `(.*?)`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        for name in re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    }
    used = {
        (module, name)
        for page in PAGES
        for module, names in re.findall(r"from (diffusers_mixofshow[\w.]*) import ([\w, ]+)", page.read_text())
        for name in names.split(", ")
    }
    assert len(used) > 20
    assert used <= listed


def test_every_page_is_in_the_navigation_once_in_a_group() -> None:
    text = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"^ +- .*: (\w+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in PAGES[1:])
    assert re.findall(r"^  - (.*):$", text, re.MULTILINE) == [
        *("Tutorials", "How-to", "Concepts", "Reference", "Development")
    ]


def test_the_architecture_page_names_every_part_and_its_picture_is_of_today() -> None:
    drawing = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))
    imports = drawing["imports_between_parts"]()
    table = re.findall(r"^\| (`.+`) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(table))) == sorted(imports)
    assert drawing["PICTURE"].read_text() == drawing["draw"](imports)


def test_the_hosted_workflows_run_what_there_is() -> None:
    workflows = [path.read_text() for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))]
    assert len(workflows) == 2
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    matrix = re.search(r"target: \[(.*)\]", workflows[0])
    assert matrix is not None
    assert set(matrix.group(1).split(", ")) | set(re.findall(r"run: make ([a-z-]+)", workflows[1])) <= targets
    for script in set(re.findall(r"run: (\.ci/\w+)", "\n".join(workflows))):
        assert (ROOT / script).stat().st_mode & 0o100, script


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {diffusers_mixofshow.__version__}\n" in text
    assert f"license: {PROJECT['license']}\n" in text
