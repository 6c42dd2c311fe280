"""Processes forked from this one, which has imported torch and diffusers already; and two that know of each other."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import IO

from accelerate.state import AcceleratorState, PartialState


SECONDS = 300
"""How long two processes may take."""


def fork(act: Callable[[], None], output: IO[str], errors: IO[str], environment: Mapping[str, str]) -> int:
    """Start a process that does something and ends as a program would, with what it prints in files; its number."""
    child = os.fork()
    if child == 0:
        _end_as_a_program(act, output.fileno(), errors.fileno(), environment)
    return child


def _end_as_a_program(act: Callable[[], None], output: int, errors: int, environment: Mapping[str, str]) -> None:
    code: object = 1
    try:
        os.dup2(output, 1)
        os.dup2(errors, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.environ |= environment
        act()
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def run_two(code: str, *arguments: str) -> list[str]:
    """Run Python code in two processes of one group, as `torchrun` and `accelerate launch` start them.

    Returns:
        What each of them printed, if both end well.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}

    def act() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # this process may know already that it is alone
        PartialState._reset_state()
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<worker>", "exec"), {"__name__": "__main__"})

    with ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in "oe"] for _ in range(2)]
        workers = [fork(act, *files[rank], shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
        codes = _wait(workers)
        printed, said = zip(*[[_read(file) for file in pair] for pair in files], strict=True)
    assert codes == [0, 0], [errors[-2000:] for errors in said]
    return list(printed)


def _wait(workers: list[int]) -> list[int | None]:
    """Exit codes of processes that end in time; the others are stopped, as are all when one has failed."""
    codes: dict[int, int | None] = {}
    end = time.monotonic() + SECONDS
    while len(codes) < len(workers) and time.monotonic() < end and not any(codes.values()):
        for worker in workers:
            if worker not in codes and (done := os.waitpid(worker, os.WNOHANG))[0]:
                codes[worker] = os.waitstatus_to_exitcode(done[1])
        time.sleep(0.02)
    for worker in workers:
        if worker not in codes:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
            codes[worker] = None
    return [codes[worker] for worker in workers]


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
