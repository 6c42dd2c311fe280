"""The ways to draw a set of LoRAs together: fused into one file by this package, or by the paper's three ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusers_mixofshow import GradientFuser, LoRASource
from diffusers_mixofshow.fusion.solving import Method

from .testbed import LORA_SCALE, SWITCH_EVERY, Element, Testbed


FUSED: tuple[Method, ...] = ("closed-form", "ssr", "average")
"""What `GradientFuser` does."""
METHODS = (*FUSED, "merge", "switch", "composite")
"""And the paper's: the sum of all updates, one LoRA after another, and the mean of what each predicts alone."""

AfterStep = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """How fusion records each LoRA, once for all sets."""

    folder: Path
    steps: int
    height: int
    width: int
    guidance_scale: float


def sources(testbed: Testbed, elements: Sequence[Element]) -> list[LoRASource]:
    """The LoRAs as strong as they are drawn, each with prompts of its own trigger words alone."""
    return [
        LoRASource(
            element.file,
            prompts=[testbed.prompt((element,)), ", ".join(element.triggers)],
            scale=LORA_SCALE,
            name=element.id,
        )
        for element in elements
    ]


def fuser_of(pipe: Any, recording: Recording, negative: str) -> GradientFuser:
    return GradientFuser(
        pipe,
        sequential=False,
        statistics=recording.folder,
        steps=recording.steps,
        height=recording.height,
        width=recording.width,
        guidance_scale=recording.guidance_scale,
        negative_prompt=negative,
        device=str(pipe.device),
    )


def record_all(pipe: Any, testbed: Testbed, elements: Sequence[Element], recording: Recording) -> None:
    """Record every LoRA, also the layers that it leaves alone and others change."""
    given, fuser = sources(testbed, elements), fuser_of(pipe, recording, testbed.negative)
    for source in given:
        fuser.record(source, alongside=given)


@contextmanager
def loaded(
    pipe: Any, testbed: Testbed, elements: Sequence[Element], method: str, recording: Recording, folder: Path
) -> Iterator[dict[str, Any]]:
    """Load a set under a method; yields what the pipeline's call needs for it.

    Args:
        pipe: A pipeline of diffusers without LoRAs, and so it leaves.
        testbed: Whose elements they are.
        elements: What is drawn together.
        method: One of `METHODS`.
        recording: How fusion records.
        folder: Where a fused file is written.
    """
    try:
        if method in FUSED:
            fuser = fuser_of(pipe, recording, testbed.negative)
            fused = fuser.fuse(sources(testbed, elements), method=method)
            fused.save_pretrained(folder, overwrite=True)
            pipe.load_lora_weights(folder, adapter_name="fused")
            yield {}
            return
        names = [element.id for element in elements]
        for element in elements:
            pipe.load_lora_weights(element.file.parent, weight_name=element.file.name, adapter_name=element.id)
        pipe.set_adapters(names[:1] if method == "switch" else names)
        scale = {"cross_attention_kwargs": {"scale": LORA_SCALE}}
        if method == "switch":
            yield scale | {"callback_on_step_end": _switching(names)}
        elif method == "composite":
            with _predicting_apart(pipe, names):
                yield scale
        else:
            yield scale
    finally:
        pipe.unload_lora_weights()


def _switching(names: Sequence[str]) -> AfterStep:
    def after_step(pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step > 0 and step % SWITCH_EVERY == 0:
            pipe.set_adapters(names[step // SWITCH_EVERY % len(names)])
        return tensors

    return after_step


@contextmanager
def _predicting_apart(pipe: Any, names: Sequence[str]) -> Iterator[None]:
    """Inside the block the U-Net predicts the mean of what it would with each LoRA alone; texts have all of them."""
    unet, inner = pipe.unet, pipe.unet.forward

    def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        predictions = []
        for name in names:
            unet.set_adapters(name)
            predictions.append(inner(*args, **kwargs)[0])
        return (torch.stack(predictions).mean(dim=0),)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward
