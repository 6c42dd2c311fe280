"""The command line: ``mixofshow train | fuse | sample | inspect | demo``, one file a verb."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console
from rich.text import Text

from diffusers_mixofshow.cli.demo import demo
from diffusers_mixofshow.cli.fuse import fuse
from diffusers_mixofshow.cli.inspect import inspect
from diffusers_mixofshow.cli.sample import sample
from diffusers_mixofshow.cli.train import SPELLINGS, train
from diffusers_mixofshow.errors import MixOfShowError


INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it (128 + SIGINT)."""

app = typer.Typer(
    name="mixofshow",
    help="Tune concepts as ED-LoRAs, fuse them into one model, and sample them together, each in its region.",
    epilog="Start with: mixofshow demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(context_settings=SPELLINGS)(train)
for _verb in (fuse, sample, inspect, demo):
    app.command()(_verb)


@app.callback()
def _options() -> None:
    """Tune concepts as ED-LoRAs, fuse them into one model, and sample them together, each in its region."""


def main() -> None:
    """Run the command line; what users can cause ends as one line, never as a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        app()
    except MixOfShowError as error:
        Console(stderr=True).print(Text(f"Error: {error}", style="red"), soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted.", style="yellow")
        sys.exit(INTERRUPTED)
