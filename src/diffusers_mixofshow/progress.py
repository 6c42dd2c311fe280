"""Progress: bars of tqdm in terminals and notebooks, and a plain line now and then in log files.

They are off where the bars of tqdm (``TQDM_DISABLE=1``), of diffusers or transformers
(``utils.logging.disable_progress_bar()``) or of a pipeline (``pipe.set_progress_bar_config(disable=True)``) are off.
Of several processes only that of rank 0 shows them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, TextIO


_SECONDS_BETWEEN_LINES = 10.0
"""Time between two lines of progress in a log file."""
_CONTROLS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\r\n]")
_TQDM_SWITCH, _BUT_OURS = "TQDM_DISABLE", "others"
"""tqdm takes any non-empty text for yes. We set "others" ourselves, which switches off all bars but this package's."""
_SWITCHES = ("diffusers.utils.logging", "transformers.utils.logging")
_IN_A_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
Listener = Callable[[str, int, int], None]
"""Takes the text before a bar, the number of steps done, and that of all steps."""
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def progress(description: str, total: int, *, done: int = 0, pipe: object = None, shown: bool = True) -> Iterator[Any]:
    """Show a progress bar on standard error while the block runs.

    Args:
        description: Text before the bar.
        total: Number of steps.
        done: Steps done already.
        pipe: A diffusers pipeline that does the work; without a bar if its own bars are switched off.
        shown: Whether this process shows progress.

    Yields:
        A bar of tqdm: ``update(steps)``, ``set_postfix_str(text)``.
    """
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=done, desc=description, **bar_settings(pipe, shown=shown)) as bar:
        listener = _listener.get()
        yield bar if listener is None else _Heard(bar, listener, description, done, total)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Tell a function of every step of the bars of `progress` inside the block, also where bars are switched off."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def announce(text: str, *, pipe: object = None, shown: bool = True) -> None:
    """Print one line about work that has no steps to count, such as loading; not if bars are switched off."""
    if not is_off(pipe, shown=shown):
        tell(text)


def tell(text: str) -> None:
    """Print a line on standard error above any bars, also if these are switched off."""
    from tqdm.auto import tqdm

    if sys.stderr is not None:  # as in a program without a console
        tqdm.write(text, file=sys.stderr)


def bar_settings(pipe: object = None, *, shown: bool = True) -> dict[str, Any]:
    """Arguments of tqdm, and of `set_progress_bar_config` of pipelines, for bars like those of `progress`.

    Args:
        pipe: See `progress`.
        shown: See `progress`.
    """
    if is_off(pipe, shown=shown):
        return {"disable": True}
    if _can_redraw():
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
        or sys.stderr is None
        or os.environ.get(_TQDM_SWITCH, "") not in ("", _BUT_OURS)
        or os.environ.get("RANK", "0") != "0"
        or bool(getattr(pipe, "_progress_bar_config", {}).get("disable"))
        or any(isinstance(module, ModuleType) and not module.is_progress_bar_enabled() for module in modules)
    )


@contextmanager
def hide_bars(pipe: Any) -> Iterator[None]:
    """Switch a pipeline's own bars off inside the block; afterwards its settings are restored."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def disable_foreign_bars() -> None:
    """If standard error cannot redraw bars, switch off other libraries' bars in this process and its children."""
    if not _can_redraw():
        os.environ.setdefault(_TQDM_SWITCH, _BUT_OURS)


def _can_redraw() -> bool:
    """Whether standard error is a terminal or a notebook, where a bar can be drawn over itself."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return (sys.stderr is not None and sys.stderr.isatty()) or "IPKernelApp" in getattr(shell, "config", {})


class _Heard:
    """A bar of tqdm whose steps a listener is told of; a bar that is switched off counts none itself."""

    def __init__(self, bar: Any, listener: Listener, description: str, done: int, total: int) -> None:
        self._bar, self._listener, self._description, self._done, self._total = bar, listener, description, done, total
        self.update(0)

    def update(self, steps: int = 1) -> None:
        """Count steps, and tell the listener."""
        self._bar.update(steps)
        self._done += steps
        self._listener(self._description, self._done, self._total)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


class _Lines:
    """A stream for tqdm that writes every state of a bar to a log as a line of its own, without control characters."""

    def __init__(self, log: TextIO) -> None:
        self._log, self._last = log, ""

    def write(self, text: str) -> None:
        """Write the text without control characters, unless it repeats the last line."""
        line = _CONTROLS.sub("", text).rstrip()
        if line and line != self._last:
            self._log.write(line + "\n")
            self._last = line

    def flush(self) -> None:
        """Flush the log."""
        self._log.flush()
