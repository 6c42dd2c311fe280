"""Errors and warnings of commands: one sentence each on standard error, no box and no line of code."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from diffusers_mixofshow.errors import MixOfShowWarning


def tell(text: str, style: str) -> None:
    """Print one line on standard error, however long it is."""
    Console(stderr=True).print(Text(text, style=style), soft_wrap=True)


def as_options(text: str) -> str:
    """A message in the words of the command line: a switch where Python has an argument."""
    return text.replace("overwrite=True", "--overwrite")


@contextmanager
def warnings_as_sentences(spelt: Callable[[str], str] = str) -> Iterator[None]:
    """Show our own warnings without the line of code that gave them; others as Python does.

    Args:
        spelt: Puts a warning into the words of the command line.
    """
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, MixOfShowWarning):
                tell(f"Warning: {spelt(str(message))}", "yellow")
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", MixOfShowWarning)
        yield
