"""``python -m diffusers_mixofshow``: the command line, and nothing where somebody only imports it."""

from __future__ import annotations

import runpy
import sys

import pytest


def test_the_package_runs_as_its_command(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["mixofshow", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("diffusers_mixofshow", run_name="__main__")
    assert end.value.code in (None, 0)
    assert "doctor" in capsys.readouterr().out


def test_an_import_runs_nothing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["mixofshow", "--help"])
    runpy.run_module("diffusers_mixofshow.__main__", run_name="diffusers_mixofshow.__main__")
    assert capsys.readouterr().out == ""
