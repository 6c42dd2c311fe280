"""Regional and layer-wise attention around a diffusers pipeline's own denoising loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers_mixofshow.conditioning.attention import RegionPlan, layerwise_attention, regional_attention
from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.pipelines.prompts import LayerwisePrompts
from diffusers_mixofshow.regions import Region


_REGIONS_DOC = """Call the pipeline with concepts in its prompts and, optionally, in regions.

        Takes all arguments of the parent, described below, and:

        Args:
            regions (`list[Region]`, *optional*):
                Parts of the picture with prompts of their own. `prompt` holds where no region is, and
                `negative_prompt` where a region has none. They are the same for all prompts of a batch.
        """


class RegionalSampling(LayerwisePrompts):
    """Mixin for a diffusers pipeline: `__call__` with `regions`. The loop is the parent's."""

    def __call__(self, *args: Any, regions: Sequence[Region] | None = None, **kwargs: Any) -> Any:
        """See `regional_signature`, which gives each pipeline class its own `__call__`."""
        parent = super().__call__  # type: ignore[misc]
        arguments = inspect.signature(parent).bind_partial(*args, **kwargs).arguments
        with self._conditioned_call(_checked(regions), arguments):
            return parent(*args, **kwargs)

    @contextmanager
    def _conditioned_call(self, regions: tuple[Region, ...], arguments: Mapping[str, Any]) -> Iterator[None]:
        """For one call: remember the regions for `encode_prompt`, and install the attention that the call needs."""
        outer, self._regions = self._regions, regions
        names = ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds")
        try:
            with ExitStack() as stack:
                if self._is_layerwise(*(arguments.get(name) for name in names)):
                    for denoiser in self._denoisers():
                        stack.enter_context(layerwise_attention(denoiser, self._tokens, self._layers))
                        if regions:
                            stack.enter_context(regional_attention(denoiser, RegionPlan(regions)))
                yield
        finally:
            self._regions = outer

    def _denoisers(self) -> list[Any]:
        """All models whose cross-attention sees the prompt."""
        return [self.unet]


def regional_signature(parent: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a `__call__(self, *args, **kwargs)` its parent pipeline's signature and docstring, plus `regions`.

    Args:
        parent: The diffusers pipeline class.
    """

    def decorate(call: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(parent.__call__)
        regions = inspect.Parameter(
            "regions", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="list[Region] | None"
        )
        parameters = list(signature.parameters.values())
        at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        call.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*parameters[:at], regions, *parameters[at:]]
        )
        call.__doc__ = _REGIONS_DOC + (inspect.getdoc(parent.__call__) or "")
        return call

    return decorate


def _checked(regions: Sequence[Region] | None) -> tuple[Region, ...]:
    if regions is None:
        return ()
    wrong = [type(region).__name__ for region in regions if not isinstance(region, Region)]
    if wrong:
        raise RegionError(f"`regions` holds {', '.join(wrong)}; expected Region(prompt, box=...) or mask=....")
    return tuple(regions)
