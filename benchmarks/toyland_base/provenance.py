"""Which code made something."""

from __future__ import annotations

import subprocess
from pathlib import Path


def current_commit() -> str:
    """Short name of the last commit that touched Toyland, or "unknown" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "log", "-1", "--format=%h", "--", "*.py"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
