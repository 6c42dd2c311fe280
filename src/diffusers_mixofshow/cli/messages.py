"""Print errors and warnings of commands as one sentence each on standard error, without a box or a line of code."""

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


def name_switches(text: str) -> str:
    """Name the command line's switch in a message that names the Python argument."""
    return text.replace("overwrite=True", "--overwrite")


@contextmanager
def show_warnings_as_sentences(reword: Callable[[str], str] = str) -> Iterator[None]:
    """Show our own warnings without the line of code that gave them; others as Python does.

    Args:
        reword: Names options in a warning that names Python arguments.
    """
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, MixOfShowWarning):
                tell(f"Warning: {reword(str(message))}", "yellow")
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", MixOfShowWarning)
        yield
