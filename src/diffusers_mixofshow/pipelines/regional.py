"""Regional and layer-wise attention around a diffusers pipeline's own denoising loop."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from diffusers_mixofshow.conditioning.attention import layerwise_attention, regional_attention
from diffusers_mixofshow.conditioning.canvas import Canvas, RegionPlan
from diffusers_mixofshow.conditioning.control import regional_control
from diffusers_mixofshow.conditioning.passes import PassHook, hook_passes
from diffusers_mixofshow.errors import RegionError, warn
from diffusers_mixofshow.pipelines.calls import separate_call
from diffusers_mixofshow.pipelines.drafting import insert_drafts
from diffusers_mixofshow.pipelines.prompts import LayerwisePrompts, repeat_for_pictures
from diffusers_mixofshow.pipelines.remarks import (
    Regions,
    remark_on_control,
    remark_on_idle_updates,
    remark_on_layout,
    remark_on_names,
    remark_on_texts,
    sort_regions,
    warn_of,
)
from diffusers_mixofshow.pipelines.wording import repeat_subjects
from diffusers_mixofshow.regions import Draft, Isolation, Region


REGIONS_DOC = """
    regions (`list[Region]`, `Layout`, or a list of these for each prompt, *optional*):
        Parts of the picture with prompts of their own. `prompt` holds where no region is, and
        `negative_prompt` where a region has none.
    isolation (`Isolation`, *optional*):
        Keeps the regions apart in self-attention, too, on the feature maps and in the steps that it names.
    draft (`Draft`, *optional*):
        Draws every region alone first and then puts it into its place, so that its prompt need not describe
        the rest of the picture. For calls that begin with noise, not with a picture.
    refine (`Refinement`, *optional*):
        In the end, redraws every region that is smaller than the model's own pictures at that size, from its
        own prompt. Needs pictures as the result (`output_type="pil"`).
"""
_EXAMPLES = re.compile(r"\n *Examples?:\n.*?(?=\n *Returns:)", re.DOTALL)
_Pipeline = TypeVar("_Pipeline", bound=type)


class RegionalSampling(LayerwisePrompts):
    """Mixin for a diffusers pipeline: `__call__` with `regions`, around the parent's denoising loop."""

    vae_scale_factor: int
    num_timesteps: int
    # Whether a call begins with noise alone instead of a picture.
    _begins_with_noise = True
    # Whether a call is remarked upon in which no prompt names a loaded concept.
    _expects_names = True
    # The current call's regions on the U-Net's feature maps.
    _canvas: Canvas | None = None
    # Hooks on the U-Net's passes that a subclass has set for its next call.
    _pass_hooks: tuple[PassHook, ...] = ()

    def __call__(
        self,
        *args: Any,
        regions: Regions | None = None,
        isolation: Isolation | None = None,
        draft: Draft | None = None,
        **kwargs: Any,
    ) -> Any:
        """See `regional_signature`, which gives each pipeline class its own `__call__`."""
        parent = super().__call__  # type: ignore[misc]
        given = inspect.signature(parent).bind_partial(*args, **kwargs)
        arguments = given.arguments
        check_kind("isolation", isolation, Isolation)
        check_kind("draft", draft, Draft)
        if draft is not None and not self._begins_with_noise:
            raise RegionError(
                "A draft needs a call that begins with noise; this one begins with a picture. Leave `draft` out."
            )
        if not regions:
            warn_of_idle_arguments(isolation=isolation, draft=draft)
        with separate_call(self, arguments), self._condition_call(regions, isolation, draft, arguments):
            return parent(*given.args, **given.kwargs)

    @property
    def guidance_scale(self) -> Any:
        """Guidance scale; a map of shape (1 or pictures, 1, height, width) if regions have scales of their own."""
        own = super().guidance_scale  # type: ignore[misc]
        canvas = self._canvas
        if canvas is None or canvas.size is None or canvas.device is None:
            return own
        if all(region.guidance_scale is None for region in canvas.regions()):
            return own
        scales = canvas.blend(
            lambda region: own if region.guidance_scale is None else region.guidance_scale, own, *canvas.size
        )
        return scales.to(dtype=canvas.dtype).to(canvas.device)

    def _move_regions(
        self, regions: tuple[tuple[Region, ...], ...], arguments: Mapping[str, Any]
    ) -> tuple[tuple[tuple[Region, ...], ...], list[str]]:
        """Move regions onto the part of the picture that the U-Net sees, here all of it; remarks are warned of."""
        return regions, []

    @contextmanager
    def _hook_next_call(self, hook: PassHook) -> Iterator[None]:
        """Run a hook before each of the U-Net's passes in the call inside the block."""
        outer, self._pass_hooks = self._pass_hooks, (hook,)
        try:
            yield
        finally:
            self._pass_hooks = outer

    @contextmanager
    def _condition_call(
        self,
        regions: Regions | None,
        isolation: Isolation | None,
        draft: Draft | None,
        arguments: MutableMapping[str, Any],
    ) -> Iterator[None]:
        """For one call, store the regions for `encode_prompt`, and install the attention that they need."""
        outer, outer_canvas = self._regions, self._canvas
        try:
            self._regions = sort_regions(regions, arguments, self.vae_scale_factor)
            self._refuse_unknown_words(self._list_texts(arguments))
            self._regions, remarks = self._move_regions(self._regions, arguments)
            remarks += self._remark_on_call(arguments)
            warn_of(self._remark_on_names(arguments))  # before the picture is drawn, which may take long
            drawn_alone = self._regions
            if draft is not None and draft.repeat_subject:
                self._regions = tuple(tuple(repeat_subjects(own, self._nameable)) for own in drawn_alone)
            with ExitStack() as stack:
                for hook in self._pass_hooks:
                    stack.enter_context(hook_passes(self._denoisers()[0], hook))
                if self._is_layerwise(arguments):
                    for denoiser in self._denoisers():
                        stack.enter_context(layerwise_attention(denoiser, self._tokens, self._layer_names))
                    self._canvas = self._install_regions(stack, isolation, arguments) if self._regions else None
                drafts = None
                if draft is not None and self._canvas is not None:
                    pictures = repeat_for_pictures(drawn_alone, arguments)
                    drafts = stack.enter_context(insert_drafts(self, draft, pictures, self._canvas.shares, arguments))
                yield
            if drafts is not None and not drafts.are_put_in and self.num_timesteps == 1:  # not if it was interrupted
                remarks.append("the draft has no effect in a call of a single step")
            if self._canvas is not None:
                remarks += remark_on_layout(self._canvas)
        finally:
            self._regions, self._canvas = outer, outer_canvas
        warn_of(remarks)

    def _install_regions(self, stack: ExitStack, isolation: Isolation | None, arguments: Mapping[str, Any]) -> Canvas:
        """Install regional attention until the stack is closed."""
        shared = [RegionPlan(own) for own in self._regions]
        plans = shared if len(shared) == 1 else repeat_for_pictures(shared, arguments)
        canvases = [
            stack.enter_context(regional_attention(denoiser, plans, lambda: self.num_timesteps, isolation, passes))
            for denoiser, passes in Counter(self._list_denoisers()).items()
        ]
        stack.enter_context(regional_control(self._denoisers()[0], canvases[0]))
        return canvases[0]

    @contextmanager
    def _hide_regions(self) -> Iterator[None]:
        """Let `encode_prompt` ignore the call's regions inside the block."""
        outer, self._regions = self._regions, ()
        try:
            yield
        finally:
            self._regions = outer

    def _remark_on_call(self, arguments: Mapping[str, Any]) -> list[str]:
        """Remark on texts and strengths that have no effect, before the call runs."""
        regions = [region for own in self._regions for region in own]
        prompt = arguments.get("prompt")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        control = any(self.components.get(name) is not None for name in ("controlnet", "adapter"))
        scale = arguments.get("controlnet_conditioning_scale", 1.0)
        return [
            *remark_on_idle_updates(self.components, self._given, self._list_texts(arguments)),
            *remark_on_texts(regions, prompts, tuple(self.concepts.values())),
            *remark_on_control(regions, scale, control),
        ]

    def _remark_on_names(self, arguments: Mapping[str, Any]) -> list[str]:
        """Remark on loaded concepts that no prompt names; on none where embeddings are given instead of prompts."""
        given = [arguments.get(name) or [] for name in ("prompt", "prompt_2")]
        prompts = [text for one in given for text in ([one] if isinstance(one, str) else one)]
        if not prompts or not self._expects_names:
            return []
        regions = [region.prompt for own in self._regions for region in own]
        packs = [pack for pack in self._edloras.values() if pack is not self._in_weights]
        loaded = [concept for pack in packs for concept in pack.concepts]
        return remark_on_names([*prompts, *regions], loaded)

    def _denoisers(self) -> list[Any]:
        """All models whose cross-attention sees the prompt, each once, the U-Net first."""
        return list(dict.fromkeys(self._list_denoisers()))

    def _list_denoisers(self) -> list[Any]:
        """`_denoisers`, each as often as it runs in a step: a ControlNet may be listed for several pictures."""
        controlnet = self.components.get("controlnet")
        return [self.unet, *getattr(controlnet, "nets", [] if controlnet is None else [controlnet])]


def check_kind(name: str, value: object, kind: type) -> None:
    """Raise if an argument is neither None nor of its class."""
    if not (value is None or isinstance(value, kind)):
        raise RegionError(f"`{name}` is a {type(value).__name__}; expected {kind.__name__}(...) or None.")


def warn_of_idle_arguments(**given: object) -> None:
    """Warn of arguments that act on regions, in a call without regions."""
    idle = [f"`{name}`" for name, value in given.items() if value is not None]
    if idle:
        verb = "has" if len(idle) == 1 else "have"
        warn(f"{' and '.join(idle)} {verb} no effect without regions.")


def regional_signature(parent: type, doc: str = "") -> Callable[[_Pipeline], _Pipeline]:
    """Give a pipeline class a `__call__` with the signature and docstring of its parent, and the arguments it adds.

    Args:
        parent: The diffusers pipeline class.
        doc: Docstring entries of arguments that the class adds beside those of `REGIONS_DOC`.
    """

    def decorate(pipeline_class: _Pipeline) -> _Pipeline:
        kind: Any = pipeline_class

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return super(kind, self).__call__(*args, **kwargs)

        call = vars(kind).get("__call__", forward)
        call.__signature__ = _join_signatures(call, super(kind, kind).__call__, parent.__call__)
        call.__doc__ = _join_docs(doc + REGIONS_DOC, parent.__call__.__doc__ or "")
        call.__name__, call.__qualname__ = "__call__", f"{kind.__qualname__}.__call__"
        kind.__call__ = call
        return pipeline_class

    return decorate


def _join_signatures(own: Any, mixin: Any, parent: Any) -> inspect.Signature:
    """Join the parameters of three methods, each once; within a kind, those of `own` come first."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found: dict[str, inspect.Parameter] = {}
    inherited, ours = inspect.signature(parent), inspect.signature(mixin, eval_str=True)
    for signature in (inspect.signature(own, eval_str=True), inherited, ours):
        for name, parameter in signature.parameters.items():
            if parameter.kind not in variable or signature is inherited:
                found.setdefault(name, parameter)
    parameters = sorted(found.values(), key=lambda parameter: parameter.kind)
    return inspect.Signature(parameters, return_annotation=ours.return_annotation)


def _join_docs(added: str, parent: str) -> str:
    """The parent's docstring with the added arguments first, and without its examples, which use another class."""
    _, mark, rest = inspect.cleandoc(_EXAMPLES.sub("", parent)).partition("Args:")
    return f"Draw pictures of prompts, with concepts and regions in them.\n\n{mark}{added.rstrip()}{rest}"
