"""Hook the forward passes of one pipeline call, without a change to those of other calls that use the same model.

Several calls may use a model at once: from threads, or one inside another's callback. What a call adds to its passes
is therefore never stored in the model: a hook puts it into the arguments of each pass that belongs to the call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn


PassArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the named arguments of a pass."""
PassHook = Callable[[tuple[Any, ...], dict[str, Any]], PassArguments]
"""Changes the positional and named arguments of a pass."""

_call: ContextVar[object | None] = ContextVar("call", default=None)
_lock = threading.Lock()


@contextmanager
def _enter_call(call: object | None) -> Iterator[None]:
    before = _call.set(call)
    try:
        yield
    finally:
        _call.reset(before)


def start_call() -> Any:
    """Let the passes inside the block belong to a new call."""
    return _enter_call(object())


def detach_from_calls(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function, such as a user's callback, so that passes inside it belong to no running call."""

    def run(*inputs: Any, **named: Any) -> Any:
        with _enter_call(None):
            return function(*inputs, **named)

    return run


@contextmanager
def hook_passes(model: nn.Module, hook: PassHook) -> Iterator[None]:
    """Let a hook change the arguments of this call's passes, outside of what `model.compile()` has traced.

    Args:
        model: Any model, also one that `torch.compile` has wrapped.
        hook: Runs before each pass of the call that enters the block, after hooks that were set earlier.
    """
    owner = _call.get()

    def run_hook(inputs: tuple[Any, ...], named: dict[str, Any]) -> PassArguments:
        return hook(inputs, named) if _call.get() is owner else (inputs, named)

    def run_registered(
        _model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any] | None = None
    ) -> PassArguments | None:
        # Without named arguments, torch runs it in another call's pass, begun while the hook was half set or removed.
        return None if named is None else run_hook(inputs, named)

    if model._compiled_call_impl is None:
        registered = model.register_forward_pre_hook(run_registered, with_kwargs=True)
        try:
            yield
        finally:
            registered.remove()
    else:
        hooked = _HookedCall.install(model)
        hooked.hooks.append(run_hook)
        try:
            yield
        finally:
            hooked.remove(model, run_hook)


class _HookedCall:
    """Replaces a model's compiled call while there are hooks, and runs them before it, untraced.

    Args:
        compiled: The call that `model.compile()` made.
    """

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self.compiled = compiled
        self.hooks: list[PassHook] = []

    @classmethod
    def install(cls, model: Any) -> _HookedCall:
        """Return the one that the model has, or install a new one."""
        with _lock:
            if not isinstance(model._compiled_call_impl, cls):
                model._compiled_call_impl = cls(model._compiled_call_impl)
            found: _HookedCall = model._compiled_call_impl
            return found

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        for hook in tuple(self.hooks):
            inputs, named = hook(inputs, named)
        return self.compiled(*inputs, **named)

    def remove(self, model: Any, hook: PassHook) -> None:
        """Remove a hook; with the last one, restore the model's compiled call."""
        with _lock:
            self.hooks.remove(hook)
            if not self.hooks and model._compiled_call_impl is self:
                model._compiled_call_impl = self.compiled
