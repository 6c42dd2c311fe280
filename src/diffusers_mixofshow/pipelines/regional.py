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


_REGIONS_TYPE = "list[Region] | None"
REGIONS_DOC = """Call the pipeline with concepts in its prompts and, optionally, in regions.

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
        """All models whose cross-attention sees the prompt, each once."""
        controlnet = self.components.get("controlnet")
        nets = list(getattr(controlnet, "nets", [] if controlnet is None else [controlnet]))
        return list(dict.fromkeys([self.unet, *nets]))


def regional_signature(parent: type, doc: str = REGIONS_DOC) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a `__call__(self, ..., *args, **kwargs)` its parent pipeline's signature and docstring, plus `regions`.

    Args:
        parent: The diffusers pipeline class.
        doc: What stands before the parent's docstring.
    """

    def decorate(call: Callable[..., Any]) -> Callable[..., Any]:
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        own = [given for given in inspect.signature(call).parameters.values() if given.kind not in variable]
        regions = inspect.Parameter("regions", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_REGIONS_TYPE)
        inherited = inspect.signature(parent.__call__)
        known = {parameter.name for parameter in own}
        others = [given for name, given in inherited.parameters.items() if name not in known]
        # Positional ones, those with names only, then **kwargs; our own first in each kind.
        parameters = sorted([*own, *others, regions], key=lambda parameter: parameter.kind)
        call.__signature__ = inherited.replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__doc__ = doc + (inspect.getdoc(parent.__call__) or "")
        return call

    return decorate


def _checked(regions: Sequence[Region] | None) -> tuple[Region, ...]:
    if regions is None:
        return ()
    wrong = [type(region).__name__ for region in regions if not isinstance(region, Region)]
    if wrong:
        raise RegionError(f"`regions` holds {', '.join(wrong)}; expected Region(prompt, box=...) or mask=....")
    return tuple(regions)
