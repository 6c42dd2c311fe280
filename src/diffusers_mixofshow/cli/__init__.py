"""The command line: ``mixofshow VERB``. Each verb has a file, and imports the code behind it when it runs."""

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
from diffusers_mixofshow.cli.messages import name_switches, show_warnings_as_sentences, tell
from diffusers_mixofshow.cli.push import push
from diffusers_mixofshow.cli.sample import sample
from diffusers_mixofshow.cli.settings import read_config
from diffusers_mixofshow.cli.train import SPELLINGS, ShortHelpCommand, train
from diffusers_mixofshow.cli.ui import ui
from diffusers_mixofshow.errors import (
    ConceptError,
    ConfigurationError,
    EDLoRANotFoundError,
    MixOfShowError,
    OverwriteError,
    RegionError,
)
from diffusers_mixofshow.progress import announce, disable_foreign_bars


FAILED = 1
"""Exit code if a check failed, or a file, the Hub or the disk does not allow what was asked for."""
WRONG_USE = 2
"""Exit code if options are unknown, contradict each other or name something that does not exist, as in shells."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells (128 + SIGINT)."""

_SLOW = ("masks", "train", "fuse", "sample", "evaluate", "compare", "ui")
"""Verbs that take seconds before they can show progress."""
_QUICK = {"--help", "--help-all", "--dry-run"}
"""Options with which they end soon."""
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
app.command(cls=ShortHelpCommand, context_settings=SPELLINGS)(train)
for _verb in (fuse, sample, evaluate, compare, inspect, convert, push, ui, demo, doctor):
    app.command()(_verb)


@app.callback()
def _apply_config(
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
        context.default_map = read_config(config, options)
    if context.invoked_subcommand in _SLOW and sys.stderr.isatty() and not _QUICK & {*sys.argv}:
        announce("Loading ...")


def main() -> None:
    """Run the command line; errors that users can cause are printed in one line, never as a traceback."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the parent process
            setattr(sys, stream, open(os.devnull, "w"))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it warns of every attempt; our error reports the last
    disable_foreign_bars()
    try:
        with show_warnings_as_sentences():
            code = app(prog_name="mixofshow", standalone_mode=False)
            sys.stdout.flush()
    except MixOfShowError as error:
        tell(f"Error: {name_switches(str(error))}", "red")
        code = WRONG_USE if isinstance(error, _MISUSES) else FAILED
    except _UsageError as error:
        _tell_of_misuse(error)
        code = WRONG_USE
    except BrokenPipeError:
        code = _discard_output()
    except OSError as error:
        tell(f"Error: standard output or a file cannot be used: {error}.", "red")
        code = _discard_output()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        tell("Interrupted.", "yellow")
    sys.exit(code or 0)  # a verb returns None


def _discard_output() -> int:
    """Redirect a broken standard output to nowhere, as Python writes what is buffered to it when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def _tell_of_misuse(error: Any) -> None:
    """Tell of wrong options in one line, instead of click's box; nothing if click has shown the help instead."""
    if message := error.format_message():
        message += "" if message.endswith((".", "?")) else "."
        message += _advise_to_repeat(error.ctx) if "extra argument" in message else ""
        help_of = f" See '{error.ctx.command_path} --help'." if error.ctx else ""
        tell(f"Error: {message}{help_of}", "red")


def _advise_to_repeat(context: Any) -> str:
    """Say how an option takes several values, if one was given after which a value too many may have stood."""
    several = [option for each in context.command.params if getattr(each, "multiple", False) for option in each.opts]
    given = [option for option in several if option in sys.argv]
    return f" Several values repeat the option: {given[0]} ONE {given[0]} OTHER." if given else ""
