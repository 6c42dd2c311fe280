"""How far something is: bars of tqdm in terminals and notebooks, and in log files a plain line now and then.

Whoever switches bars off switches off these as well: for tqdm (``TQDM_DISABLE=1``), for diffusers or transformers
(``utils.logging.disable_progress_bar()``), or for a pipeline (``pipe.set_progress_bar_config(disable=True)``). Of
several processes the first tells.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TextIO


_SECONDS_BETWEEN_LINES = 10.0
"""How often a log is told how far something is."""
_CONTROLS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\r\n]")
_TQDM_SWITCH, _BUT_OURS = "TQDM_DISABLE", "others"
"""tqdm takes any text for yes; this one is ours."""
_SWITCHES = ("diffusers.utils.logging", "transformers.utils.logging")
_IN_A_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@contextmanager
def progress(description: str, total: int, *, done: int = 0, pipe: object = None, shown: bool = True) -> Iterator[Any]:
    """Show how far something is while the block runs, on standard error.

    Args:
        description: What is done.
        total: Number of steps.
        done: Steps done already.
        pipe: A diffusers pipeline that does it, which may have its bars switched off.
        shown: Whether this process tells.

    Yields:
        A bar of tqdm: ``update(steps)``, ``set_postfix_str(text)``.
    """
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=done, desc=description, **bar_settings(pipe, shown=shown)) as bar:
        yield bar


def announce(text: str, *, pipe: object = None, shown: bool = True) -> None:
    """Tell in one line what is under way and has no steps to count, such as loading."""
    if not is_off(pipe, shown=shown):
        tell(text)


def tell(text: str) -> None:
    """Print a line on standard error, above whatever bars there are; for what is more than progress."""
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stderr)


def bar_settings(pipe: object = None, *, shown: bool = True) -> dict[str, Any]:
    """Arguments of tqdm, and of `set_progress_bar_config` of pipelines, for bars like those of `progress`.

    Args:
        pipe: See `progress`.
        shown: See `progress`.
    """
    if is_off(pipe, shown=shown):
        return {"disable": True}
    if _redraws():
        return {}
    return {
        "disable": False,
        "file": _Lines(sys.stderr),
        "mininterval": _SECONDS_BETWEEN_LINES,
        "maxinterval": _SECONDS_BETWEEN_LINES,
        "miniters": 1,
        "bar_format": _IN_A_LINE,
    }


def is_off(pipe: object = None, *, shown: bool = True) -> bool:
    """Whether bars are switched off, or another process shows them."""
    modules = (sys.modules.get(name) for name in _SWITCHES)
    return (
        not shown
        or os.environ.get(_TQDM_SWITCH, "") not in ("", _BUT_OURS)
        or os.environ.get("RANK", "0") != "0"
        or bool(getattr(pipe, "_progress_bar_config", {}).get("disable"))
        or any(isinstance(module, ModuleType) and not module.is_progress_bar_enabled() for module in modules)
    )


@contextmanager
def without_bars(pipe: Any) -> Iterator[None]:
    """A pipeline without bars of its own for the length of the block; afterwards its settings are what they were."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def lines_only() -> None:
    """Where bars cannot be redrawn, switch off those of all other programs for this process and its children."""
    if not _redraws():
        os.environ.setdefault(_TQDM_SWITCH, _BUT_OURS)


def _redraws() -> bool:
    """Whether what reads standard error can draw over a line: a terminal, or a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or "IPKernelApp" in getattr(shell, "config", {})


class _Lines:
    """A log file as tqdm sees it: every state of a bar becomes a line of its own, without control characters."""

    def __init__(self, log: TextIO) -> None:
        self._log, self._last = log, ""

    def write(self, text: str) -> None:
        """Write what is left of the text without controls, unless it was just said."""
        line = _CONTROLS.sub("", text).rstrip()
        if line and line != self._last:
            self._log.write(line + "\n")
            self._last = line

    def flush(self) -> None:
        """Flush the log."""
        self._log.flush()
