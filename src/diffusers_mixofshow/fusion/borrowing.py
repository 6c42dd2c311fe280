"""Which pipelines fusion can borrow: those that load concepts and draw from a prompt alone."""

from __future__ import annotations

import inspect
import os
from typing import Any

from diffusers_mixofshow.errors import FusionError


_PARTS = ("unet", "text_encoder", "tokenizer", "vae", "scheduler")
_METHODS = ("load_edlora", "unload_edlora", "concepts_set_aside")


def refuse_unfusable(pipe: Any) -> None:
    """Refuse what is no pipeline that concepts can be sampled with; None is no pipeline at all, which may be right.

    Raises:
        FusionError: Says what it is, and how to make the right one of it.
    """
    if pipe is None:
        return
    defect = _defect(pipe)
    if defect:
        raise FusionError(f"GradientFuser needs a loaded MixOfShowPipeline, got {defect}.")


def _defect(pipe: Any) -> str:
    if isinstance(pipe, str | os.PathLike):
        return f"{os.fspath(pipe)!r}. Load it: MixOfShowPipeline.from_pretrained({os.fspath(pipe)!r})"
    if isinstance(pipe, type):
        return f"the class {pipe.__name__}. Load one: {pipe.__name__}.from_pretrained('user/base')"
    name, components = type(pipe).__name__, getattr(pipe, "components", None)
    if not isinstance(components, dict) or not callable(pipe):
        return f"a {name}, which is no pipeline"
    if components.get("text_encoder_2") is not None:
        return f"a {name} with two text encoders; SDXL cannot be fused yet, only Stable Diffusion 1.x and its like"
    if missing := [part for part in _PARTS if components.get(part) is None]:
        return f"a {name} without {', '.join(missing)}; concepts are for Stable Diffusion 1.x and its like"
    needs_picture = "image" in inspect.signature(pipe.__call__).parameters
    if needs_picture or not all(hasattr(pipe, method) for method in _METHODS):
        why = ", which needs a picture to draw" if needs_picture else ", which loads no concepts"
        return f"a {name}{why}. Give MixOfShowPipeline.from_pipe(pipe), which shares its models"
    return ""
