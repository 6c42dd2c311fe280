"""Let Ctrl-C, or a request to end, stop a training between two steps instead of in the middle of one."""

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
        requested: Whether this process got Ctrl-C, or SIGTERM, which schedulers of clusters and `timeout` send.
        everywhere: Whether any process got it, which all processes learn after the same step.
    """

    requested: bool = False
    everywhere: bool = False


@contextmanager
def notice_interruption() -> Iterator[Interruption]:
    """Record the first Ctrl-C or SIGTERM inside the block; a second one raises `KeyboardInterrupt` at once.

    Afterwards the previous signal handlers are restored. In a thread other than the main one, where Python cannot set
    handlers, nothing is recorded.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def note(_signal: int, _frame: object) -> None:
        if interruption.requested:
            raise KeyboardInterrupt
        interruption.requested = True

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
