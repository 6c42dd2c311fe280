"""Attention processors that read their own part of a stacked conditioning, installed as long as any call is under way.

A conditioning is always 3-D, so that every check, repeat and concatenation of diffusers works on it unmodified:
(batch, contexts * layers * tokens, dim). Contexts are the global prompt and the regions, outermost; inside each
context stand the encodings for layer 0, 1, ... (see `encode`). `regional_attention` cuts by context and
`layerwise_attention` by layer.

Where diffusers' plain processor was installed, queries and outputs are projected once for all contexts, keys and
values once for all steps, and each position attends to its own contexts alone. Any other processor, an IP-Adapter's
say, is run as it is, once for each context at that context's positions.

Calls that overlap, from threads or one inside another's callback, share the processors, which keep nothing of a call:
which contexts hold where comes with the arguments of each pass (see `passes`); one that brings nothing is as before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0
from peft.tuners.lora import LoraLayer
from torch import nn

from diffusers_mixofshow.conditioning.canvas import Canvas, Group, Placement, RegionPlan
from diffusers_mixofshow.conditioning.passes import hook_passes
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families.clip import POSITIONS
from diffusers_mixofshow.families.layers import cross_attention_layers, self_attention_layers
from diffusers_mixofshow.families.recognition import uncompiled
from diffusers_mixofshow.regions import Isolation


__all__ = ["RegionPlan", "layerwise_attention", "regional_attention"]

# With an IP-Adapter the text comes together with a list of image embeddings.
_Conditioning = torch.Tensor | tuple[torch.Tensor, object]
_Processor = Callable[..., torch.Tensor]
# How a pass hands its regions to the processors, by the name of their argument.
_CANVAS = "canvas"
_lock = threading.Lock()
_AnyWrapper = TypeVar("_AnyWrapper", bound="_Wrapper")


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
def layerwise_attention(
    denoiser: nn.Module, tokens: int = POSITIONS, layers: Sequence[str] | None = None
) -> Iterator[SharedTexts]:
    """Let every cross-attention layer see its own part of a layer-wise conditioning.

    Inside, the denoiser takes `encoder_hidden_states` of shape (batch, layers * tokens, dim), or
    (batch, tokens, dim) as before, and fewer rows than pictures once `SharedTexts` says who reads which. Afterwards
    it has its own processors back, unless another call still needs ours.

    Args:
        denoiser: A U-Net, or a ControlNet made from one.
        tokens: Tokens of one encoding.
        layers: Whose encodings stand in the conditioning, see `embedding_layers`; each cross-attention module reads
            its own or its group's. By default each module of the denoiser has one. A ControlNet needs it: it sees
            what its U-Net does, and has some of its layers.

    Yields:
        Where texts are shared by pictures; without regions only.

    Raises:
        ConfigurationError: If a call under way reads stacks of another size, or a module's encoding is not there.
    """
    paths = cross_attention_layers(denoiser)
    names = paths if layers is None else tuple(layers)
    places = [_place_among(names, path) for path in paths]
    with _wrap(denoiser, dict.fromkeys(paths, _StackedProcessor)) as processors:
        shared = next((processor.shared for processor in processors), SharedTexts())
        for place, processor in zip(places, processors, strict=True):
            processor.cut_by(_Cut(place, len(names), tokens), shared)
        yield shared


def _place_among(layers: Sequence[str], path: str) -> int:
    """Which of the layers a module is, or belongs to."""
    for place, layer in enumerate(layers):
        if path == layer or path.startswith(f"{layer}."):
            return place
    raise ConfigurationError(
        f"The cross-attention module {path} is none of the U-Net's, nor in one of its groups ({', '.join(layers)}): "
        "no encoding belongs to it. Take a ControlNet that was made from a U-Net like this."
    )


@contextmanager
def regional_attention(
    denoiser: nn.Module,
    plans: RegionPlan | Sequence[RegionPlan],
    steps: Callable[[], int] | None = None,
    isolation: Isolation | None = None,
) -> Iterator[Canvas]:
    """Blend the cross-attention of all contexts by the plan's weights (section 3.4).

    out[p] = sum_c w_c[p] Attn(Q[p], K_c, V_c), each context computed only where its weight is not 0. Inside, the
    denoiser takes `encoder_hidden_states` of shape (batch, contexts * n, dim) in the passes of the call under way;
    those of other calls are as before. To combine it with `layerwise_attention`, enter that first.

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

    def hand_over(inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        canvas.prepare_pass(inputs, named)
        return inputs, {
            **named,
            "cross_attention_kwargs": {**(named.get("cross_attention_kwargs") or {}), _CANVAS: canvas},
        }

    wrappers: dict[str, type[_Wrapper]] = dict.fromkeys(cross_attention_layers(denoiser), _StackedProcessor)
    wrappers |= dict.fromkeys(self_attention_layers(denoiser), _IsolatingProcessor)
    with _wrap(denoiser, wrappers), hook_passes(denoiser, hand_over):
        yield canvas


@contextmanager
def _wrap(denoiser: nn.Module, wrappers: Mapping[str, type[_AnyWrapper]]) -> Iterator[list[_AnyWrapper]]:
    """Put a wrapper around each layer's processor, or use the one that another call has put there.

    With the last call that leaves, each layer has its own processor back. One that was set meanwhile stays.
    """
    layers: dict[str, Any] = {path: uncompiled(denoiser).get_submodule(path) for path in wrappers}
    with _lock:
        used = {path: _wrapper_of(layers[path], kind) for path, kind in wrappers.items()}
    try:
        yield list(used.values())
    finally:
        with _lock:
            for path, wrapper in used.items():
                wrapper.users -= 1
                if not wrapper.users and layers[path].processor is wrapper:
                    _set_processor(layers[path], wrapper.inner)


def _wrapper_of(layer: Any, kind: type[_AnyWrapper]) -> _AnyWrapper:
    wrapper = layer.processor
    if not isinstance(wrapper, kind):
        wrapper = (kind.with_weights if isinstance(wrapper, nn.Module) else kind)(wrapper)
        _set_processor(layer, wrapper)
    wrapper.users += 1
    return wrapper


def _set_processor(layer: nn.Module, processor: Any) -> None:
    """Replace a layer's processor in its place, so that a thread which walks or runs the model meanwhile is not hurt.

    A processor that is a module, an IP-Adapter's say, sits among the layer's children, any other among its attributes.
    """
    place = layer._modules if "processor" in layer._modules else vars(layer)
    place["processor"] = processor


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


class _Wrapper:
    """Stands in for a layer's processor as long as any call needs it.

    Args:
        inner: The processor that was installed.
    """

    # The same for a processor that is a module itself, which diffusers and offload treat otherwise.
    with_weights: ClassVar[type[Any]]

    def __init__(self, inner: _Processor) -> None:
        super().__init__()
        self.inner = inner
        self.users = 0


class _StackedProcessor(_Wrapper):
    """Attends to this layer's part of each context, at the positions where that context holds."""

    def __init__(self, inner: _Processor) -> None:
        super().__init__(inner)
        self.shared = SharedTexts()
        # Which part of each context is this layer's; all of it where nobody has said.
        self.cut: _Cut | None = None
        self._projected: _Projected | None = None

    def cut_by(self, cut: _Cut, shared: SharedTexts) -> None:
        """Read a part of each context, and who reads whose text off `shared`."""
        if self.cut not in (None, cut):
            raise ConfigurationError(
                f"This model reads {cut.layers} layers of {cut.tokens} tokens here, but another number in a call that"
                " is under way. Run one after the other."
            )
        self.cut, self.shared = cut, shared

    def __call__(  # Attention looks at this signature, so nn.Module's own __call__ does not do.
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: _Conditioning,
        attention_mask: torch.Tensor | None = None,
        ip_adapter_masks: object = None,
        canvas: Canvas | None = None,
    ) -> torch.Tensor:
        text, with_text = _split(encoder_hidden_states)
        contexts = 1 if canvas is None else canvas.contexts
        placements = None if canvas is None else canvas.placements(hidden_states)
        if attention_mask is None and ip_adapter_masks is None and _is_plain(attn, self.inner):
            return self._attend(attn, hidden_states, text, contexts, placements)
        stacks = self.shared.spread(self._contexts(text, contexts), len(hidden_states))

        def run(queries: torch.Tensor, context: int) -> torch.Tensor:
            return _run(self.inner, attn, queries, with_text(stacks[:, context]), attention_mask, ip_adapter_masks)

        if placements is None:
            return run(hidden_states, 0)
        # An IP-Adapter's masks have one value for each position, so with them no position may be left out.
        return _blend_runs(run, hidden_states, placements, whole=ip_adapter_masks is not None)

    def _contexts(self, text: torch.Tensor, count: int) -> torch.Tensor:
        """This layer's part of every context, shape (batch, contexts, tokens, dim)."""
        if text.shape[1] % count:
            raise ConfigurationError(
                f"The conditioning has {text.shape[1]} tokens; expected {count} contexts of equal length, the global"
                f" prompt's and {count - 1} regions'."
            )
        stacks = text.unflatten(1, (count, -1))
        return stacks if self.cut is None else self.cut.of(stacks)

    def _attend(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        text: torch.Tensor,
        contexts: int,
        placements: list[Placement] | None,
    ) -> torch.Tensor:
        """What `AttnProcessor2_0` computes, for several contexts at once."""
        keys, values = self._keys_and_values(attn, text, contexts)
        queries = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))  # -> (batch, positions, heads, head)
        if placements is None:
            keys, values = (self.shared.spread(each[:, 0], len(queries)) for each in (keys, values))
            attended = dispatch_attention_fn(queries, keys, values)
        else:
            attended = _blend_contexts(queries, keys, values, placements)
        return _projected_out(attn, attended)

    def _keys_and_values(self, attn: Any, text: torch.Tensor, contexts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all contexts, shape (batch, contexts, tokens, heads, head)."""
        if torch.compiler.is_compiling():
            return self._project(attn, text, contexts)
        known = self._projected  # read once, as another thread may replace it
        if known is None or not known.is_of(attn, text, contexts):
            keys, values = self._project(attn, text, contexts)
            known = _Projected(text, _version(text), _strengths(attn), contexts, keys, values)
            self._projected = None if known.version is None or keys.requires_grad else known
        return known.keys, known.values

    def _project(self, attn: Any, text: torch.Tensor, contexts: int) -> tuple[torch.Tensor, torch.Tensor]:
        stacks = self._contexts(text, contexts)
        keys, values = (
            project(stacks.flatten(0, 1)).unflatten(0, stacks.shape[:2]).unflatten(-1, (attn.heads, -1))
            for project in (attn.to_k, attn.to_v)
        )
        return keys, values


class _IsolatingProcessor(_Wrapper):
    """Self-attention in which the queries of a region do not see the keys of another."""

    def __call__(  # Attention looks at this signature, so nn.Module's own __call__ does not do.
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        canvas: Canvas | None = None,
    ) -> torch.Tensor:
        groups = None if canvas is None else canvas.groups(hidden_states)
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


class _StackedModule(_StackedProcessor, nn.Module):
    """A `_StackedProcessor` with the inner one as a child, so that offload and dtype changes reach its weights."""


class _IsolatingModule(_IsolatingProcessor, nn.Module):
    """An `_IsolatingProcessor` with the inner one as a child."""


_StackedProcessor.with_weights = _StackedModule
_IsolatingProcessor.with_weights = _IsolatingModule


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
    contexts: int
    keys: torch.Tensor
    values: torch.Tensor

    def is_of(self, attn: Any, text: torch.Tensor, contexts: int) -> bool:
        """Whether this text, unchanged, and these LoRA strengths would give the same again."""
        same_text = self.text is text and self.version == _version(text) and self.contexts == contexts
        return same_text and self.strengths == _strengths(attn)


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
