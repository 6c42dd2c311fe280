"""What the command line offers, so that a table in a test can be held against it, and how tests run it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import huggingface_hub
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging
from typer.main import get_command

import processes
from diffusers_mixofshow import cli


VERBS = (
    "masks",
    "train",
    "fuse",
    "sample",
    "evaluate",
    "compare",
    "inspect",
    "convert",
    "push",
    "ui",
    "demo",
    "doctor",
)
"""Every verb, in the order of the work."""


def options_of(verb: str) -> set[str]:
    """Every option of a command by each of its spellings, and its arguments by their names."""
    command = get_command(cli.app).commands[verb]
    return {spelling for each in command.params for spelling in (*each.opts, *each.secondary_opts)}


def named_in(*rows: object) -> set[str]:
    """Every option that stands in rows of texts, however nested."""
    if all(isinstance(row, str) for row in rows):
        return {row for row in rows if row.startswith("--")}
    return set().union(*(named_in(row) if isinstance(row, str) else named_in(*row) for row in rows))


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``mixofshow`` in a process forked from this one, which has imported torch and diffusers already."""

    def act() -> None:
        """What a new process would do; what libraries read from the environment at import is set by hand."""
        os.chdir(cwd or Path.cwd())
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
        sys.argv = ["mixofshow", *arguments]
        cli.main()

    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = processes.fork(act, output, errors, {"COLUMNS": "100", "NO_COLOR": "1"})
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, code, output.read(), errors.read())
