"""Attention processors that read their own part of a stacked conditioning, installed for the time of a call.

A conditioning is always 3-D, so that every check, repeat and concatenation of diffusers works on it unmodified:
(batch, contexts * layers * tokens, dim). Contexts are the global prompt and the regions, outermost; inside each
context stand the encodings for layer 0, 1, ... (see `encode`). `regional_attention` cuts by context and
`layerwise_attention` by layer.

Where diffusers' plain processor was installed, queries and outputs are projected once for all contexts, keys and
values once for all steps, and each position attends to its own contexts alone. Any other processor, an IP-Adapter's
say, is run as it is, once for each context at that context's positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0
from peft.tuners.lora import LoraLayer
from torch import nn

from diffusers_mixofshow.conditioning.canvas import Canvas, Group, Placement, RegionPlan
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.regions import Isolation
from diffusers_mixofshow.sites import cross_attention_layers, self_attention_layers, uncompiled


__all__ = ["RegionPlan", "layerwise_attention", "regional_attention"]

# With an IP-Adapter the text comes together with a list of image embeddings.
_Conditioning = torch.Tensor | tuple[torch.Tensor, object]
_Processor = Callable[..., torch.Tensor]
_Wrapper = Callable[[_Processor], _Processor]


@dataclass(eq=False)
class SharedTexts:
    """Which text each picture of a batch reads, where a batch has fewer texts than pictures.

    Keys and values are then computed once for each text. As long as a batch has as many texts as pictures, each
    picture reads its own.

    Args:
        text_of: Row of the conditioning for every picture, shape (batch,).
    """

    text_of: torch.Tensor | None = None

    def spread(self, rows: torch.Tensor, pictures: int) -> torch.Tensor:
        """One row for each picture."""
        return rows if self.text_of is None or len(rows) == pictures else rows[self.text_of]


@contextmanager
def layerwise_attention(denoiser: nn.Module, tokens: int = 77, layers: int | None = None) -> Iterator[SharedTexts]:
    """Let every cross-attention layer see its own part of a layer-wise conditioning.

    Inside, the denoiser takes `encoder_hidden_states` of shape (batch, layers * tokens, dim), or
    (batch, tokens, dim) as before, and fewer rows than pictures once `SharedTexts` says who reads which. Afterwards
    it has its own processors back.

    Args:
        denoiser: A U-Net, or a ControlNet made from one.
        tokens: Tokens of one encoding.
        layers: Number of layers in the conditioning; those of the denoiser by default. A ControlNet needs it:
            its layers are the first ones of its U-Net.

    Yields:
        Where texts are shared by pictures; without regions only.
    """
    paths = cross_attention_layers(denoiser)
    layers = len(paths) if layers is None else layers
    shared = SharedTexts()
    processors = {
        path: partial(_StackedProcessor, cut=_Cut(layer, layers, tokens), shared=shared)
        for layer, path in enumerate(paths)
    }
    with _processors_wrapped(denoiser, processors):
        yield shared


@contextmanager
def regional_attention(
    denoiser: nn.Module,
    plans: RegionPlan | Sequence[RegionPlan],
    steps: Callable[[], int] | None = None,
    isolation: Isolation | None = None,
) -> Iterator[Canvas]:
    """Blend the cross-attention of all contexts by the plan's weights (section 3.4).

    out[p] = sum_c w_c[p] Attn(Q[p], K_c, V_c), each context computed only where its weight is not 0. Inside, the
    denoiser takes `encoder_hidden_states` of shape (batch, contexts * n, dim). To combine it with
    `layerwise_attention`, enter that first.

    Args:
        denoiser: A U-Net or ControlNet.
        plans: The regions, of all pictures or of each picture. A batch of twice as many rows, for guidance, has the
            same pictures in both halves. Plans with fewer regions than others leave the last contexts unused.
        steps: How many times the denoiser will be called, for regions with a start or an end; asked for in the
            first call. Without it they hold all the time.
        isolation: Whether and where self-attention keeps the regions apart, too.

    Yields:
        The plans on the denoiser's feature maps.
    """
    canvas = Canvas([plans] if isinstance(plans, RegionPlan) else plans, steps, isolation)
    regional: _Wrapper = partial(_with_canvas, canvas=canvas)
    wrappers = dict.fromkeys(cross_attention_layers(denoiser), regional)
    if isolation is not None:
        isolating: _Wrapper = partial(_IsolatingProcessor, canvas=canvas)
        wrappers |= dict.fromkeys(self_attention_layers(denoiser), isolating)
    with _calls_noted(denoiser, canvas), _processors_wrapped(denoiser, wrappers):
        yield canvas


@contextmanager
def _calls_noted(denoiser: Any, canvas: Canvas) -> Iterator[None]:
    """Tell the canvas of every call of the denoiser, outside of what `denoiser.compile()` has traced."""
    compiled = denoiser._compiled_call_impl

    def note_and_run(*inputs: Any, **named: Any) -> Any:
        canvas.note_call(denoiser, inputs, named)
        return compiled(*inputs, **named)

    if compiled is None:
        hook = denoiser.register_forward_pre_hook(canvas.note_call, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
    else:
        denoiser._compiled_call_impl = note_and_run
        try:
            yield
        finally:
            denoiser._compiled_call_impl = compiled


@contextmanager
def _processors_wrapped(denoiser: nn.Module, wrappers: Mapping[str, _Wrapper]) -> Iterator[None]:
    layers: dict[str, Any] = {path: uncompiled(denoiser).get_submodule(path) for path in wrappers}
    originals = {path: layer.processor for path, layer in layers.items()}
    try:
        for path, wrap in wrappers.items():
            layers[path].processor = wrap(originals[path])
        yield
    finally:
        for path, original in originals.items():
            _put_back(layers[path], original)


def _put_back(layer: Any, original: _Processor) -> None:
    # A wrapper is a module and so sits among the layer's children, where a plain processor cannot replace it.
    if not isinstance(original, nn.Module):
        layer._modules.pop("processor", None)
    layer.processor = original


@dataclass(frozen=True)
class _Cut:
    """Which part of a stack of layers a processor reads."""

    layer: int
    layers: int
    tokens: int

    def of(self, stacks: torch.Tensor) -> torch.Tensor:
        """Cut (batch, contexts, layers * tokens, dim) to (batch, contexts, tokens, dim)."""
        if stacks.shape[2] == self.layers * self.tokens:
            return stacks[:, :, self.layer * self.tokens : (self.layer + 1) * self.tokens]
        if stacks.shape[2] != self.tokens:
            raise ConfigurationError(
                f"The conditioning has {stacks.shape[2]} tokens; expected {self.tokens}, or {self.layers} layers of"
                f" {self.tokens}. Encode it with the pipeline that uses it."
            )
        return stacks


class _StackedProcessor(nn.Module):
    """Attends to this layer's part of each context, at the positions where that context holds.

    Args:
        inner: The processor that was installed; a child, so that offload and dtype changes reach its weights.
        cut: Which part of each context is this layer's; all of it by default.
        canvas: Which contexts hold where; one context everywhere by default.
        shared: Which text each picture reads; its own by default.
    """

    def __init__(
        self,
        inner: _Processor,
        *,
        cut: _Cut | None = None,
        canvas: Canvas | None = None,
        shared: SharedTexts | None = None,
    ) -> None:
        super().__init__()
        self.inner, self.cut, self.canvas = inner, cut, canvas
        self.shared = SharedTexts() if shared is None else shared
        self._projected: _Projected | None = None

    def __call__(  # Attention looks at this signature, so nn.Module's own __call__ does not do.
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: _Conditioning,
        attention_mask: torch.Tensor | None = None,
        ip_adapter_masks: object = None,
    ) -> torch.Tensor:
        text, with_text = _split(encoder_hidden_states)
        placements = None if self.canvas is None else self.canvas.placements(hidden_states)
        if attention_mask is None and ip_adapter_masks is None and _is_plain(attn, self.inner):
            return self._attend(attn, hidden_states, text, placements)
        stacks = self.shared.spread(self._contexts(text), len(hidden_states))

        def run(queries: torch.Tensor, context: int) -> torch.Tensor:
            return _run(self.inner, attn, queries, with_text(stacks[:, context]), attention_mask, ip_adapter_masks)

        if placements is None:
            return run(hidden_states, 0)
        # An IP-Adapter's masks have one value for each position, so with them no position may be left out.
        return _blend_runs(run, hidden_states, placements, whole=ip_adapter_masks is not None)

    def _contexts(self, text: torch.Tensor) -> torch.Tensor:
        """This layer's part of every context, shape (batch, contexts, tokens, dim)."""
        count = 1 if self.canvas is None else self.canvas.contexts
        if text.shape[1] % count:
            raise ConfigurationError(
                f"The conditioning has {text.shape[1]} tokens; expected {count} contexts of equal length, the global"
                f" prompt's and {count - 1} regions'."
            )
        stacks = text.unflatten(1, (count, -1))
        return stacks if self.cut is None else self.cut.of(stacks)

    def _attend(
        self, attn: Any, hidden_states: torch.Tensor, text: torch.Tensor, placements: list[Placement] | None
    ) -> torch.Tensor:
        """What `AttnProcessor2_0` computes, for several contexts at once."""
        keys, values = self._keys_and_values(attn, text)
        queries = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))  # -> (batch, positions, heads, head)
        if placements is None:
            keys, values = (self.shared.spread(each[:, 0], len(queries)) for each in (keys, values))
            attended = dispatch_attention_fn(queries, keys, values)
        else:
            attended = _blend_contexts(queries, keys, values, placements)
        return _projected_out(attn, attended)

    def _keys_and_values(self, attn: Any, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all contexts, shape (batch, contexts, tokens, heads, head)."""
        if torch.compiler.is_compiling():
            return self._project(attn, text)
        if self._projected is None or not self._projected.is_of(attn, text):
            self._projected = _Projected(text, _version(text), _strengths(attn), *self._project(attn, text))
        keys, values = self._projected.keys, self._projected.values
        if self._projected.version is None or keys.requires_grad:
            self._projected = None
        return keys, values

    def _project(self, attn: Any, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stacks = self._contexts(text)
        keys, values = (
            project(stacks.flatten(0, 1)).unflatten(0, stacks.shape[:2]).unflatten(-1, (attn.heads, -1))
            for project in (attn.to_k, attn.to_v)
        )
        return keys, values


class _IsolatingProcessor(nn.Module):
    """Self-attention in which the queries of a region do not see the keys of another.

    Args:
        inner: The processor that was installed.
        canvas: Who attends to whom.
    """

    def __init__(self, inner: _Processor, canvas: Canvas) -> None:
        super().__init__()
        self.inner, self.canvas = inner, canvas

    def __call__(  # Attention looks at this signature, so nn.Module's own __call__ does not do.
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        groups = self.canvas.groups(hidden_states)
        if groups is None or attention_mask is not None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask=attention_mask)
        if _is_plain(attn, self.inner):
            return _attend_in_groups(attn, hidden_states, groups)
        output = torch.empty_like(hidden_states)
        for group in groups:
            rows = hidden_states[group.rows]
            part = self.inner(attn, rows[:, group.asking], rows[:, group.asked])
            group.put(output, part)
        return output


def _attend_in_groups(attn: Any, hidden_states: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
    """What `AttnProcessor2_0` computes, each group of queries with its own keys; no mask, so for every backend."""
    queries, keys, values = (
        project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
    )
    attended = torch.empty_like(queries)
    for group in groups:
        of_group = [part[group.rows] for part in (queries, keys, values)]
        part = dispatch_attention_fn(
            of_group[0][:, group.asking], of_group[1][:, group.asked], of_group[2][:, group.asked]
        )
        group.put(attended, part)
    return _projected_out(attn, attended)


@dataclass(frozen=True, eq=False)
class _Projected:
    """Keys and values, and what they were made from: a text does not change from step to step.

    They are not kept where gradients need the projection again, nor where a change of the text would go unseen.
    """

    text: torch.Tensor
    version: int | None
    strengths: tuple[object, ...]
    keys: torch.Tensor
    values: torch.Tensor

    def is_of(self, attn: Any, text: torch.Tensor) -> bool:
        """Whether this text, unchanged, and these LoRA strengths would give the same again."""
        return self.text is text and self.version == _version(text) and self.strengths == _strengths(attn)


def _version(text: torch.Tensor) -> int | None:
    """Count the text's changes; None where nobody counts them."""
    return None if text.is_inference() else text._version


def _strengths(attn: Any) -> tuple[object, ...]:
    """What a callback may change of the LoRA layers between two steps."""
    return tuple(
        (tuple(layer.scaling.items()), tuple(layer.active_adapters), layer.disable_adapters, layer.merged)
        for layer in (attn.to_k, attn.to_v)
        if isinstance(layer, LoraLayer)
    )


def _is_plain(attn: Any, inner: _Processor) -> bool:
    """Whether the processor is diffusers' plain one, on a layer as the blocks of a U-Net have it."""
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    return type(inner) is AttnProcessor2_0 and not any(extras) and not attn.residual_connection


def _projected_out(attn: Any, attended: torch.Tensor) -> torch.Tensor:
    """Heads (batch, positions, heads, head) to the layer's output (batch, positions, channels)."""
    output = attended.flatten(2)
    for layer in attn.to_out:  # a projection and dropout
        output = layer(output)
    return output / attn.rescale_output_factor


def _with_canvas(inner: _Processor, canvas: Canvas) -> _StackedProcessor:
    if isinstance(inner, _StackedProcessor) and inner.canvas is None:
        return _StackedProcessor(inner.inner, cut=inner.cut, canvas=canvas)
    return _StackedProcessor(inner, canvas=canvas)


def _blend_contexts(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, placements: Sequence[Placement]
) -> torch.Tensor:
    """out[p] = sum_c w_c[p] Attn(Q[p], K_c, V_c).

    Args:
        queries: Shape (batch, positions, heads, head).
        keys: Shape (batch, contexts, tokens, heads, head), and so the values.
        values: See `keys`.
        placements: Which contexts hold where, for some rows of the batch each, together for all of them.

    Returns:
        Shape (batch, positions, heads, head).
    """
    if len(placements) == 1:
        return _blend_placed(queries, keys, values, placements[0])
    blended = torch.empty_like(queries)
    for placed in placements:
        rows = placed.rows
        blended[rows] = _blend_placed(queries[rows], keys[rows], values[rows], placed)
    return blended


def _blend_placed(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, placed: Placement) -> torch.Tensor:
    """`_blend_contexts` for rows of one plan: gather queries by context, attend, and put the outputs back."""
    gathered = queries[:, placed.positions] if placed.is_sorting else queries
    outputs = [
        dispatch_attention_fn(gathered[:, span], keys[:, context], values[:, context])
        for context, span in placed.spans
    ]
    attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return placed.put_back(attended)


def _blend_runs(
    run: Callable[[torch.Tensor, int], torch.Tensor],
    hidden_states: torch.Tensor,
    placements: Sequence[Placement],
    *,
    whole: bool,
) -> torch.Tensor:
    """`_blend_contexts` for a processor that does the whole of attention: `run(hidden states, context)`."""
    blended = torch.empty_like(hidden_states)
    for placed in placements:
        outputs = []
        for context, span in placed.spans:
            where = placed.positions[span]
            everywhere = whole or not placed.is_sorting
            output = run(hidden_states if everywhere else hidden_states[:, where], context)
            outputs.append(output[placed.rows][:, where] if everywhere else output[placed.rows])
        blended[placed.rows] = placed.put_back(torch.cat(outputs, dim=1))
    return blended


def _split(conditioning: _Conditioning) -> tuple[torch.Tensor, Callable[[torch.Tensor], _Conditioning]]:
    """Take out the text, and how to put another text in its place."""
    if isinstance(conditioning, tuple):
        text, images = conditioning
        return text, lambda other: (other, images)
    return conditioning, lambda other: other


def _run(
    inner: _Processor,
    attn: nn.Module,
    hidden_states: torch.Tensor,
    conditioning: _Conditioning,
    attention_mask: torch.Tensor | None,
    ip_adapter_masks: object,
) -> torch.Tensor:
    only_if_given = {} if ip_adapter_masks is None else {"ip_adapter_masks": ip_adapter_masks}
    return inner(attn, hidden_states, conditioning, attention_mask=attention_mask, **only_if_given)
