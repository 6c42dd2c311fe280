"""The command line: ``mixofshow VERB``, one file a verb; a verb's stage is imported when it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusers_mixofshow.cli.compare import compare
from diffusers_mixofshow.cli.convert import convert
from diffusers_mixofshow.cli.demo import demo
from diffusers_mixofshow.cli.doctor import doctor
from diffusers_mixofshow.cli.evaluate import evaluate
from diffusers_mixofshow.cli.fuse import fuse
from diffusers_mixofshow.cli.inspect import inspect
from diffusers_mixofshow.cli.masks import masks
from diffusers_mixofshow.cli.messages import as_options, tell, warnings_as_sentences
from diffusers_mixofshow.cli.push import push
from diffusers_mixofshow.cli.sample import sample
from diffusers_mixofshow.cli.settings import settings_from
from diffusers_mixofshow.cli.train import SPELLINGS, train
from diffusers_mixofshow.cli.ui import ui
from diffusers_mixofshow.errors import (
    ConceptError,
    ConfigurationError,
    EDLoRANotFoundError,
    MixOfShowError,
    OverwriteError,
    RegionError,
)
from diffusers_mixofshow.progress import announce, lines_only


FAILED = 1
"""Exit code where a check failed, or a file, the Hub or the disk does not allow what was asked for."""
WRONG_USE = 2
"""Exit code where options are unknown, contradict each other or name what is not there, as shells expect it."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it (128 + SIGINT)."""

_SLOW = ("masks", "train", "fuse", "sample", "evaluate", "compare", "ui")
"""Verbs that need seconds before they can tell how far they are."""
_MISUSES = (ConceptError, ConfigurationError, EDLoRANotFoundError, OverwriteError, RegionError)
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer has no public name for it

app = typer.Typer(
    name="mixofshow",
    help="Tune concepts as ED-LoRAs, fuse them into one model, and sample them together, each in its region.",
    epilog="Start with: mixofshow demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(masks)
app.command(context_settings=SPELLINGS)(train)
for _verb in (fuse, sample, evaluate, compare, inspect, convert, push, ui, demo, doctor):
    app.command()(_verb)


@app.callback()
def _options(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with a table for each verb, or a picture of 'sample'; what is given after the verb wins."
        ),
    ] = None,
) -> None:
    """Tune concepts as ED-LoRAs, fuse them into one model, and sample them together, each in its region."""
    if config is not None:
        commands = getattr(context.command, "commands", {})
        options = {
            verb: {
                spelling.lstrip("-").replace("-", "_"): parameter
                for parameter in command.params
                for spelling in parameter.opts
            }
            for verb, command in commands.items()
        }
        context.default_map = settings_from(config, options)
    if context.invoked_subcommand in _SLOW and sys.stderr.isatty() and not {"--help", "--dry-run"} & {*sys.argv}:
        announce("Loading ...")


def main() -> None:
    """Run the command line; what users can cause ends as one line, never as a traceback."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by who started us
            setattr(sys, stream, open(os.devnull, "w"))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells of every try; our error tells of the last
    lines_only()
    try:
        with warnings_as_sentences():
            code = app(prog_name="mixofshow", standalone_mode=False)
            sys.stdout.flush()
    except MixOfShowError as error:
        tell(f"Error: {as_options(str(error))}", "red")
        code = WRONG_USE if isinstance(error, _MISUSES) else FAILED
    except _UsageError as error:
        _tell_of_misuse(error)
        code = WRONG_USE
    except BrokenPipeError:
        code = _without_output()
    except OSError as error:
        tell(f"Error: standard output or a file cannot be used: {error}.", "red")
        code = _without_output()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        tell("Interrupted.", "yellow")
    sys.exit(code or 0)  # a verb that is done returns None


def _without_output() -> int:
    """Let go of a standard output that takes nothing more, so that Python does not try once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def _tell_of_misuse(error: Any) -> None:
    """One line where click would draw a box of five; nothing where it has shown the help instead."""
    if message := error.format_message():
        message += "" if message.endswith((".", "?")) else "."
        help_of = f" See '{error.ctx.command_path} --help'." if error.ctx else ""
        tell(f"Error: {message}{help_of}", "red")
