"""The command line: ``mixofshow VERB``, one file a verb; a verb's stage is imported when it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from diffusers_mixofshow.cli.convert import convert
from diffusers_mixofshow.cli.demo import demo
from diffusers_mixofshow.cli.doctor import doctor
from diffusers_mixofshow.cli.fuse import fuse
from diffusers_mixofshow.cli.inspect import inspect
from diffusers_mixofshow.cli.push import push
from diffusers_mixofshow.cli.sample import sample
from diffusers_mixofshow.cli.settings import settings_from
from diffusers_mixofshow.cli.train import SPELLINGS, train
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowError


FAILED = 1
"""Exit code where a check failed, or what was asked for cannot be done."""
WRONG_USE = 2
"""Exit code where options are unknown, missing or contradict each other, as shells expect it."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it (128 + SIGINT)."""

app = typer.Typer(
    name="mixofshow",
    help="Tune concepts as ED-LoRAs, fuse them into one model, and sample them together, each in its region.",
    epilog="Start with: mixofshow demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(context_settings=SPELLINGS)(train)
for _verb in (fuse, sample, inspect, convert, push, demo, doctor):
    app.command()(_verb)


@app.callback()
def _options(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with a table for each verb; what is given after the verb wins.")
    ] = None,
) -> None:
    """Tune concepts as ED-LoRAs, fuse them into one model, and sample them together, each in its region."""
    if config is not None:
        commands = getattr(context.command, "commands", {})
        options = {
            verb: {parameter.name: parameter for parameter in command.params} for verb, command in commands.items()
        }
        context.default_map = settings_from(config, options)
    import rich

    rich.reconfigure(stderr=True)  # where rich shows progress unless told otherwise; results go to standard output


def main() -> None:
    """Run the command line; what users can cause ends as one line, never as a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except MixOfShowError as error:
        _tell(f"Error: {error}", "red")
        sys.exit(WRONG_USE if isinstance(error, ConfigurationError) else FAILED)
    except KeyboardInterrupt:
        _tell("Interrupted.", "yellow")
        sys.exit(INTERRUPTED)


def _tell(text: str, style: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(text, style=style), soft_wrap=True)
