"""Ctrl-C between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Interruption:
    """Whether the user wants the training to stop.

    Args:
        requested: Whether this process was told so.
        everywhere: Whether all processes have agreed to stop.
    """

    requested: bool = False
    everywhere: bool = False


@contextmanager
def notice_interruption() -> Iterator[Interruption]:
    """Note the first Ctrl-C inside the block instead of raising it; a second one raises `KeyboardInterrupt` at once.

    The handler that was there is back afterwards. Outside the main thread, where Python sets no handlers, nothing is
    noticed.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(_signal: int, _frame: object) -> None:
        if interruption.requested:
            raise KeyboardInterrupt
        interruption.requested = True

    signal.signal(signal.SIGINT, note)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, previous)
