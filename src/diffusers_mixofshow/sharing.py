"""Locks on models: several threads may use one, but while a thread changes it no other thread may use or change it.

A thread that cannot enter gets an error at once instead of waiting.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from diffusers_mixofshow.errors import ConfigurationError


@dataclass(eq=False)
class _Work:
    """Thread to the number of `using` and of `changing` blocks of one model that it is in."""

    using: Counter[int] = field(default_factory=Counter)
    changing: Counter[int] = field(default_factory=Counter)


_work: WeakKeyDictionary[object, _Work] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def using(*things: object) -> Iterator[None]:
    """Use models inside the block; other threads may use them at the same time.

    Raises:
        ConfigurationError: If another thread is changing one of them.
    """
    with _enter(things, changes=False):
        yield


@contextmanager
def changing(*things: object, refusal: str = "") -> Iterator[bool]:
    """Change models, or other things that serve one thread at a time, inside the block. Blocks of a thread may nest.

    Args:
        things: Any objects that can be referred to weakly.
        refusal: The error's text in place of the usual one.

    Yields:
        Whether this thread is inside another such block of one of them.

    Raises:
        ConfigurationError: If another thread uses or changes one of them.
    """
    with _enter(things, changes=True, refusal=refusal) as again:
        yield again


@contextmanager
def _enter(things: tuple[object, ...], *, changes: bool, refusal: str = "") -> Iterator[bool]:
    thread = threading.get_ident()
    with _lock:
        works = [_work.setdefault(thing, _Work()) for thing in things]
        for thing, work in zip(things, works, strict=True):
            others = (work.using + work.changing if changes else work.changing).keys() - {thread}
            if others:
                raise ConfigurationError(refusal or _in_use(thing, changes))
        again = any(thread in work.changing for work in works)
        counts = [work.changing if changes else work.using for work in works]
        for count in counts:
            count[thread] += 1
    try:
        yield again
    finally:
        with _lock:
            for count in counts:
                count[thread] -= 1
                if not count[thread]:
                    del count[thread]


def _in_use(thing: object, changes: bool) -> str:
    name = type(thing).__name__
    if changes:
        return (
            f"Another thread draws or trains with this {name}, so that nothing can be loaded into it, taken out or "
            'scaled now (cross_attention_kwargs={"scale": ...} scales LoRA layers, too). Wait until that is done, or '
            "give each thread a model of its own."
        )
    return (
        f"Another thread is changing this {name}: it loads, trains or fuses a concept, or scales LoRA layers "
        '(cross_attention_kwargs={"scale": ...}). Wait until that is done, or give each thread a model of its own.'
    )
