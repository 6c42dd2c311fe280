"""Let Ctrl-C, or a request to end, stop a training between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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

    Afterwards the previous signal handlers are restored. A signal that the process ignores, as shells' background jobs
    do, or that a library handles outside Python, is left alone. In a thread other than the main one, where Python
    cannot set handlers, nothing is recorded.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def note(_signal: int, _frame: object) -> None:
        if interruption.requested:
            raise KeyboardInterrupt
        interruption.requested = True

    heeded = [each for each in _SIGNALS if signal.getsignal(each) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, note) for number in heeded}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
