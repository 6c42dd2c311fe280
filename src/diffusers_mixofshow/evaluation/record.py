"""Describe how a measurement was made, to be kept beside its numbers: versions, machine, commit and command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from diffusers_mixofshow.atomic import write_whole
from diffusers_mixofshow.versions import PACKAGE, installed_version


_PACKAGES = (PACKAGE, "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results depend on."""
    found = {package: version for package in _PACKAGES if (version := installed_version(package))}
    return found | {"python": platform.python_version()}


def machine() -> str:
    """The machine in words: system, processor, cores, and the GPU if there is one."""
    import torch

    name = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def command() -> str:
    """The running command line; of the program and of absolute paths only the last part, as folders are private.

    A path may follow a name and ``=``, as in ``potter=/home/me/photos`` and ``--record=/home/me/record.json``.
    """
    parts = [word.rpartition("=") for word in sys.argv[1:]]
    given = [start + mark + (Path(end).name if Path(end).is_absolute() else end) for start, mark, end in parts]
    return " ".join([Path(sys.argv[0]).name, *given])


def run_info(folder: Path) -> dict[str, object]:
    """Command, commit, time in UTC, machine and versions of the current run.

    Args:
        folder: A folder in the checkout whose commit is recorded.
    """
    return {
        "command": command(),
        "commit": commit(folder),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }


def write(path: Path, content: Mapping[str, object]) -> Path:
    """Write a record as JSON, whole or not at all, and return its path; a missing folder is made."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def commit(folder: Path) -> str | None:
    """The commit of a checkout, with ``+`` if tracked files differ from it; None for a folder that none tracks."""
    try:
        _git(folder, "ls-files", "--error-unmatch", ".")  # an installed package may lie in its user's repository
        name = _git(folder, "rev-parse", "--short=12", "HEAD")
        return name + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip()
