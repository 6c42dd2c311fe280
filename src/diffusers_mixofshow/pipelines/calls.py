"""Keep a pipeline's call apart from calls in other threads, and from the call whose callback it runs in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from peft.tuners.lora import LoraLayer
from torch import nn

from diffusers_mixofshow.conditioning.passes import detach_from_calls, start_call
from diffusers_mixofshow.families.layers import components_with_sites
from diffusers_mixofshow.sharing import changing, using


# Attributes that diffusers' calls set on their pipeline.
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
    """Keep a call apart from all others that run with the same models.

    Several threads may call pipelines that share models. A call inside another call's callback restores the
    attributes of the pipeline and of the scheduler that it uses.

    Args:
        pipe: The pipeline that is called.
        arguments: The call's arguments; callbacks among them are replaced, so that calls which they make do not
            count as part of this one.

    Raises:
        ConfigurationError: If another thread uses this very pipeline or scheduler, or changes a model.
    """
    for owner in (arguments, arguments.get("kwargs", {})):
        for name in ("callback_on_step_end", "callback"):
            # diffusers' own callbacks draw nothing, and its pipelines check their class.
            if callable(owner.get(name)) and not isinstance(owner[name], PipelineCallback | MultiPipelineCallbacks):
                owner[name] = detach_from_calls(owner[name])
    models = components_with_sites(pipe.components).values()
    enter = changing if _scales_lora(arguments, models) else using
    with _reserve(pipe, _OF_A_CALL), _reserve(pipe.scheduler), enter(*models), start_call():
        yield


@contextmanager
def _reserve(thing: Any, names: tuple[str, ...] | None = None) -> Iterator[None]:
    """Reserve an object for this thread; a nested block restores the named attributes, or all of them."""
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
    """Whether diffusers will rescale LoRA layers during each forward pass, which changes the model."""
    given = arguments.get("cross_attention_kwargs") or {}
    return given.get("scale", 1) != 1 and any(
        isinstance(part, LoraLayer) for model in models for part in model.modules()
    )
