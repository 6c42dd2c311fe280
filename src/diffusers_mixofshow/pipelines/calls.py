"""A call beside those of other threads, and inside another call's callback, as if it were alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from peft.tuners.lora import LoraLayer
from torch import nn

from diffusers_mixofshow.conditioning.passes import outside_of_calls, own_call
from diffusers_mixofshow.families.layers import components_with_sites
from diffusers_mixofshow.sharing import changing, using


# What diffusers' calls leave on their pipeline while they run.
_OF_A_CALL = (
    "_guidance_scale",
    "_guidance_rescale",
    "_clip_skip",
    "_cross_attention_kwargs",
    "_interrupt",
    "_denoising_start",
    "_denoising_end",
    "_num_timesteps",
)
_BUSY = (
    "This {name} serves a call in another thread already. Give each thread a pipeline of its own, with a scheduler of "
    "its own; the models may be shared: "
    "MixOfShowPipeline.from_pipe(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))."
)


@contextmanager
def separate_call(pipe: Any, arguments: MutableMapping[str, Any]) -> Iterator[None]:
    """Keep a call apart from all others that are under way with the same models.

    Calls of several threads run at the same time. A call inside a callback leaves its pipeline and scheduler to the
    outer one as it found them, whichever it uses.

    Args:
        pipe: The pipeline that is called.
        arguments: Of the call; callbacks among them are replaced, so that what they draw is no part of it.

    Raises:
        ConfigurationError: If another thread uses this very pipeline or scheduler, or changes a model.
    """
    for owner in (arguments, arguments.get("kwargs", {})):
        for name in ("callback_on_step_end", "callback"):
            # Those of diffusers draw nothing, and its calls look at their class.
            if callable(owner.get(name)) and not isinstance(owner[name], PipelineCallback | MultiPipelineCallbacks):
                owner[name] = outside_of_calls(owner[name])
    models = components_with_sites(pipe.components).values()
    at_work = changing if _scales_lora(arguments, models) else using
    with _lent(pipe, _OF_A_CALL), _lent(pipe.scheduler), at_work(*models), own_call():
        yield


@contextmanager
def _lent(thing: Any, names: tuple[str, ...] | None = None) -> Iterator[None]:
    """Take a thing for one thread; inside of another such block, give it back with its attributes as they were."""
    with changing(thing, refusal=_BUSY.format(name=type(thing).__name__)) as again:
        before = {name: value for name, value in vars(thing).items() if names is None or name in names}
        try:
            yield
        finally:
            if again:
                for name in vars(thing).keys() - before.keys() if names is None else ():
                    delattr(thing, name)
                vars(thing).update(before)


def _scales_lora(arguments: Mapping[str, Any], models: Iterable[nn.Module]) -> bool:
    """Whether diffusers will change the strength of LoRA layers for the length of each pass."""
    given = arguments.get("cross_attention_kwargs") or {}
    return given.get("scale", 1) != 1 and any(
        isinstance(part, LoraLayer) for model in models for part in model.modules()
    )
