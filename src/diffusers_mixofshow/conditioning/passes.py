"""Which forward passes of a model belong to the call under way, so that what one call adds reaches no other's.

Several calls may use one model: from threads, or one inside another's callback. What a call adds to its passes is
therefore never state of the model: it is handed over with the arguments of each pass, by a hook that knows its call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
PassHook = Callable[[tuple[Any, ...], dict[str, Any]], _Arguments]
"""What a call does to the positional and named arguments of each of its passes."""

_call: ContextVar[object | None] = ContextVar("call", default=None)
_lock = threading.Lock()


@contextmanager
def _belonging_to(call: object | None) -> Iterator[None]:
    before = _call.set(call)
    try:
        yield
    finally:
        _call.reset(before)


def start_call() -> Any:
    """A block whose passes are those of a new call."""
    return _belonging_to(object())


def detach_from_calls(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run so that passes inside it belong to no call under way: for what users hand in."""

    def run(*inputs: Any, **named: Any) -> Any:
        with _belonging_to(None):
            return function(*inputs, **named)

    return run


@contextmanager
def hook_passes(model: nn.Module, hook: PassHook) -> Iterator[None]:
    """Let a hook change the arguments of this call's passes, outside of what `model.compile()` has traced.

    Args:
        model: Any model, also one that `torch.compile` has wrapped.
        hook: Run before each pass of the call that enters the block, after the hooks that it entered before.
    """
    owner = _call.get()

    def of_own_passes(inputs: tuple[Any, ...], named: dict[str, Any]) -> _Arguments:
        return hook(inputs, named) if _call.get() is owner else (inputs, named)

    if model._compiled_call_impl is None:
        registered = model.register_forward_pre_hook(
            lambda _model, inputs, named: of_own_passes(inputs, named), with_kwargs=True
        )
        try:
            yield
        finally:
            registered.remove()
    else:
        entrance = _Entrance.of(model)
        entrance.hooks.append(of_own_passes)
        try:
            yield
        finally:
            entrance.leave(model, of_own_passes)


class _Entrance:
    """Stands in for a model's compiled call as long as there are hooks: they run first, untraced.

    Args:
        compiled: What `model.compile()` made.
    """

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self.compiled = compiled
        self.hooks: list[PassHook] = []

    @classmethod
    def of(cls, model: Any) -> _Entrance:
        """The one that the model has, or a new one."""
        with _lock:
            if not isinstance(model._compiled_call_impl, cls):
                model._compiled_call_impl = cls(model._compiled_call_impl)
            found: _Entrance = model._compiled_call_impl
            return found

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        for hook in tuple(self.hooks):
            inputs, named = hook(inputs, named)
        return self.compiled(*inputs, **named)

    def leave(self, model: Any, hook: PassHook) -> None:
        """Drop a hook, and with the last one the model gets its compiled call back."""
        with _lock:
            self.hooks.remove(hook)
            if not self.hooks and model._compiled_call_impl is self:
                model._compiled_call_impl = self.compiled
