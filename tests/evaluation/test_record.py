"""What stands beside a number: whose command, which commit, which machine and versions."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

import pytest
import torch

from diffusers_mixofshow.evaluation import record


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=x", "-c", "user.email=x@y")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_commit_is_told_with_a_plus_where_tracked_files_differ(tmp_path: Path) -> None:
    assert record.commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert record.commit(tmp_path) is None  # nothing is committed yet
    (tmp_path / "x").write_text("1")
    git(tmp_path, "add", "x")
    git(tmp_path, "commit", "-qm", "one")
    name = git(tmp_path, "rev-parse", "HEAD")[:12]
    (tmp_path / "not tracked").touch()
    assert record.commit(tmp_path) == name
    (tmp_path / "x").write_text("2")
    assert record.commit(tmp_path) == f"{name}+"


def test_without_git_no_commit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.commit(Path(__file__).parent) is None


def test_folders_of_this_machine_are_told_by_their_last_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/bin/mixofshow", "compare", "/home/me/rex", "here/tom", "--steps=1"])
    assert record.command() == "mixofshow compare rex here/tom --steps=1"


def test_the_machine_and_its_gpu_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    assert record.machine() == plain
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    assert record.machine() == f"{plain}, Card"


def test_versions_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = ("diffusers-mixofshow", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
    expected = {name: metadata.version(name) for name in libraries} | {"python": platform.python_version()}
    assert record.versions() == expected
    usual = metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError
        return usual(name)

    monkeypatch.setattr(metadata, "version", version)
    assert record.versions() == {name: value for name, value in expected.items() if name != "peft"}


def test_a_run_tells_all_of_it_and_is_written_whole(tmp_path: Path) -> None:
    info = record.run_info(tmp_path)
    assert list(info) == ["command", "commit", "time", "machine", "versions"]
    assert info["commit"] is None
    assert (info["command"], info["machine"], info["versions"]) == (
        record.command(), record.machine(), record.versions(),
    )  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", str(info["time"]))
    age = datetime.now(UTC) - datetime.fromisoformat(str(info["time"]))
    assert timedelta(seconds=-2) < age < timedelta(minutes=5)
    file = record.write(tmp_path / "new" / "x.json", {"a": [1]})
    assert file.read_text() == '{\n "a": [\n  1\n ]\n}\n'
    assert json.loads(file.read_text()) == {"a": [1]}


def test_folders_behind_a_name_are_told_by_their_last_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "x",
        "evaluate",
        "--photos",
        "rex=/home/me/photos/rex",
        "--photos=tom=/home/me/tom",
        "--record=/me/r.json",
    ]
    monkeypatch.setattr(sys, "argv", given)
    assert record.command() == "x evaluate --photos rex=rex --photos=tom=tom --record=r.json"


def test_the_commit_of_a_users_own_repository_is_not_the_packages(tmp_path: Path) -> None:
    site = tmp_path / ".venv" / "site-packages"
    site.mkdir(parents=True)
    (site / "module.py").touch()
    (tmp_path / ".gitignore").write_text(".venv")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".gitignore")
    git(tmp_path, "commit", "-qm", "thesis")
    assert record.commit(site) is None
    assert record.commit(tmp_path)
