"""The examples run as they stand."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_files_that_the_documentation_names_exist() -> None:
    root = Path(__file__).parents[1]
    pages = sorted((root / "docs").glob("*.md"))
    named = {
        name for page in pages for name in re.findall(r"`((?:src|benchmarks)/[\w/.]+\.py)`", page.read_text("utf-8"))
    }
    assert len(pages) >= 4
    assert len(named) > 10
    assert [name for name in sorted(named) if not (root / name).exists()] == []


def test_names_that_the_documentation_maps_are_in_the_files_it_names() -> None:
    root = Path(__file__).parents[1]
    rows = [
        line.split("|")
        for page in sorted((root / "docs").glob("*.md"))
        for line in page.read_text("utf-8").splitlines()
        if line.startswith("|") and "`src/" in line
    ]
    missing = [
        (name, path)
        for row in rows
        for path in re.findall(r"`(src/[^`]+)`", row[-2])
        for name in re.findall(r"`([A-Za-z_]+)`", row[2])
        if name not in (root / path).read_text("utf-8")
    ]
    assert missing == []
