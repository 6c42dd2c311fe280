"""Let Ctrl-C stop a training between two steps instead of in the middle of one."""

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
        requested: Whether this process got Ctrl-C.
        everywhere: Whether any process got it, which all processes learn after the same step.
    """

    requested: bool = False
    everywhere: bool = False


@contextmanager
def notice_interruption() -> Iterator[Interruption]:
    """Record the first Ctrl-C inside the block; a second one raises `KeyboardInterrupt` at once.

    Afterwards the previous signal handler is restored. In a thread other than the main one, where Python cannot set
    handlers, nothing is recorded.
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
