"""A plugin of pytest that notes which test runs which function of the package, and the processor time of each test.

`run.py` loads it (`-p mutation.watching`); every process writes ``functions-*.json`` into the folder that the variable
MUTATION_MAP names. Line coverage would be finer, but its database does not outlive tests that fork.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from types import FrameType

import pytest


_PART = "src" + os.sep + "diffusers_mixofshow" + os.sep
_keys: dict[object, str | None] = {}
_met: dict[str, set[str]] = defaultdict(set)
_seconds: dict[str, float] = defaultdict(float)
_now = ""
_process = os.getpid()


def _note(frame: FrameType, event: str, argument: object) -> None:
    """Called by Python whenever a function begins."""
    code = frame.f_code
    if code not in _keys:
        name = code.co_filename
        # What a comprehension or a lambda runs, its function runs.
        function = re.sub(r"(\.<locals>)?\.?<(?!locals).*$", "", code.co_qualname)
        _keys[code] = f"{name[name.index(_PART) :]}:{function}" if _PART in name else None
    if (key := _keys[code]) is not None:
        _met[key].add(_now)


def pytest_sessionstart() -> None:
    sys.settrace(_note)
    threading.settrace(_note)


def pytest_runtest_setup(item: pytest.Item) -> None:
    # What a fixture runs, it may run for all tests of the file.
    _set(item.nodeid.split("::")[0])


def pytest_runtest_call(item: pytest.Item) -> None:
    _set(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    before = _spent()
    result = yield
    _seconds[item.nodeid] += _spent() - before
    return result


def _spent() -> float:
    """Seconds of a processor that this process and those it waited for have used, however busy the machine is."""
    return sum(os.times()[:4])


def _set(name: str) -> None:
    global _now
    _now = name
    if sys.gettrace() is None:  # a test took it
        sys.settrace(_note)


def pytest_sessionfinish() -> None:
    sys.settrace(None)
    folder = os.environ.get("MUTATION_MAP")
    if folder and os.getpid() == _process:
        found = {"functions": {key: sorted(tests) for key, tests in _met.items()}, "seconds": dict(_seconds)}
        Path(folder, f"functions-{_process}.json").write_text(json.dumps(found))
