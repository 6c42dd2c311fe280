"""Attention processors that read their layer's and their regions' part of a stacked conditioning.

They are installed while any call runs. A conditioning is always 3-D, so that every check, repeat and concatenation of
diffusers works on it unmodified: (batch, contexts * layers * tokens, dim). The contexts, outermost, are the global
prompt and the regions; each holds the encodings for layer 0, 1, ... (see `encode`). `regional_attention` cuts by
context and `layerwise_attention` by layer.

Where diffusers' plain processor was installed, queries and outputs are projected once for all contexts, keys and
values once for all steps, and each position attends to its own contexts alone. Any other processor, for example an
IP-Adapter's, is run unchanged, once for each context at that context's positions.

Calls that overlap, from threads or one inside another's callback, share the processors. These store nothing of a call:
what is its own comes with the arguments of each pass (see `passes`). A pass without contexts and their positions runs
as if there were no regions, and a text that is not marked (see `_Marker`) is read whole by every layer.
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
from diffusers_mixofshow.conditioning.passes import PassArguments, hook_passes
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families.clip import POSITIONS
from diffusers_mixofshow.families.layers import cross_attention_layers, self_attention_layers
from diffusers_mixofshow.families.recognition import unwrap_compiled
from diffusers_mixofshow.regions import Isolation


__all__ = ["RegionPlan", "layerwise_attention", "regional_attention"]

# With an IP-Adapter the text comes together with a list of image embeddings.
_Conditioning = torch.Tensor | tuple[torch.Tensor, object]
_Processor = Callable[..., torch.Tensor]
# The processors' argument that hands them a pass's regions.
_CANVAS = "canvas"
# The text among a denoiser's arguments: its name, and its number where it has none.
_TEXT, _PLACE_OF_TEXT = "encoder_hidden_states", 2
# Dimensions of a text that is not marked (see `_Marker`).
_PLAIN = 3
_lock = threading.Lock()
_AnyWrapper = TypeVar("_AnyWrapper", bound="_Wrapper")


@dataclass(eq=False)
class SharedTexts:
    """Which text each picture of a batch reads, where a batch has fewer texts than pictures.

    Keys and values are then computed once for each text. With as many texts as pictures, each picture reads its own.

    Args:
        text_of: Row of the conditioning for every picture, shape (batch,).
    """

    text_of: torch.Tensor | None = None

    def spread(self, rows: torch.Tensor, pictures: int) -> torch.Tensor:
        """Repeat rows of texts to one row for each picture."""
        return rows if self.text_of is None or len(rows) == pictures else rows[self.text_of]


@contextmanager
def layerwise_attention(
    denoiser: nn.Module, tokens: int = POSITIONS, layers: Sequence[str] | None = None
) -> Iterator[SharedTexts]:
    """Let every cross-attention layer see its own part of a layer-wise conditioning.

    Inside the block, the denoiser takes `encoder_hidden_states` of shape (batch, layers * tokens, dim), or
    (batch, tokens, dim) as before, and fewer rows than pictures once `SharedTexts` says which picture reads which
    row; in the passes of other calls, it takes what it takes without. Afterwards its own processors are restored,
    unless another call still needs these.

    Args:
        denoiser: A U-Net, or a ControlNet made from one; where `torch.compile` has wrapped it, what is called.
        tokens: Tokens of one encoding.
        layers: The layers whose encodings the conditioning holds, in order (see `embedding_layers`); each
            cross-attention module reads that of its layer or its group. By default those of the denoiser itself. A
            ControlNet needs those of its U-Net, whose conditioning it reads with only some of the layers.

    Yields:
        Settings by which pictures share texts; not for use with regions.

    Raises:
        ConfigurationError: If a running call reads stacks of another size, or a module belongs to none of the layers.
    """
    paths = cross_attention_layers(denoiser)
    names = paths if layers is None else tuple(layers)
    places = [_find_layer(names, path) for path in paths]
    with _wrap(denoiser, dict.fromkeys(paths, _StackedProcessor)) as processors:
        shared = next((processor.shared for processor in processors), SharedTexts())
        for place, processor in zip(places, processors, strict=True):
            processor.cut_by(_Cut(place, len(names), tokens), shared)
        with hook_passes(denoiser, _Marker()):
            yield shared


class _Marker:
    """Gives the text of a call's passes one more dimension, (batch, 1, tokens, dim): each layer cuts out its part.

    A text that several passes share remains one tensor, as keys and values are kept for it.
    """

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> PassArguments:
        if len(inputs) > _PLACE_OF_TEXT:
            return (*inputs[:_PLACE_OF_TEXT], self._mark(inputs[_PLACE_OF_TEXT]), *inputs[_PLACE_OF_TEXT + 1 :]), named
        return inputs, {**named, _TEXT: self._mark(named[_TEXT])}

    def _mark(self, text: torch.Tensor) -> torch.Tensor:
        last = self._last
        if last is None or last[0] is not text:
            last = text, text[:, None]
            self._last = None if text.requires_grad else last  # which would keep what computed it
        return last[1]


def _find_layer(layers: Sequence[str], path: str) -> int:
    """Number of the layer that a module is, or belongs to."""
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
    passes: int = 1,
) -> Iterator[Canvas]:
    """Blend the cross-attention of all contexts by the plan's weights (section 3.4 of the paper).

    out[p] = sum_c w_c[p] Attn(Q[p], K_c, V_c), each context computed only where its weight is not 0. Inside the block,
    the denoiser takes `encoder_hidden_states` of shape (batch, contexts * n, dim) in the passes of the current call;
    the passes of other calls do not change. To combine it with `layerwise_attention`, enter that first.

    Args:
        denoiser: A U-Net or ControlNet.
        plans: The regions, of all pictures or of each picture. A batch of twice as many rows, for guidance, has the
            same pictures in both halves. Plans with fewer regions than others leave the last contexts unused.
        steps: Returns the number of denoising steps, for regions with a start or an end; called in the first pass.
            Without it all regions always hold.
        isolation: Whether and where self-attention keeps the regions apart, too.
        passes: How many times the denoiser is called in each step.

    Yields:
        The plans on the denoiser's feature maps.
    """
    canvas = Canvas([plans] if isinstance(plans, RegionPlan) else plans, steps, isolation, passes)

    def hand_over(inputs: tuple[Any, ...], named: dict[str, Any]) -> PassArguments:
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

    When the last call leaves, each layer's own processor is restored. A processor that was set meanwhile stays.
    """
    layers: dict[str, Any] = {path: unwrap_compiled(denoiser).get_submodule(path) for path in wrappers}
    with _lock:
        used = {path: _acquire_wrapper(layers[path], kind) for path, kind in wrappers.items()}
    try:
        yield list(used.values())
    finally:
        with _lock:
            for path, wrapper in used.items():
                wrapper.users -= 1
                if not wrapper.users and layers[path].processor is wrapper:
                    _set_processor(layers[path], wrapper.inner)


def _acquire_wrapper(layer: Any, kind: type[_AnyWrapper]) -> _AnyWrapper:
    wrapper = layer.processor
    if not isinstance(wrapper, kind):
        wrapper = (kind.with_weights if isinstance(wrapper, nn.Module) else kind)(wrapper)
        _set_processor(layer, wrapper)
    wrapper.users += 1
    return wrapper


def _set_processor(layer: nn.Module, processor: Any) -> None:
    """Replace a layer's processor without removing it first, as other threads may run or walk the model meanwhile.

    A processor that is a module, such as an IP-Adapter's, is a child of the layer; any other is an attribute.
    """
    place = layer._modules if "processor" in layer._modules else vars(layer)
    place["processor"] = processor


@dataclass(frozen=True)
class _Cut:
    """Cuts one layer's part out of a stack of layers."""

    layer: int
    layers: int
    tokens: int

    def apply(self, stacks: torch.Tensor) -> torch.Tensor:
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
    """Replaces a layer's processor while any call needs it.

    Args:
        inner: The processor that was installed.
    """

    # The wrapper for processors that are modules, which diffusers and offloading find among the layer's children.
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
        # Cuts this layer's part out of each context; None if a context has one encoding for all layers.
        self.cut: _Cut | None = None
        self._projected: _Projected | None = None

    def cut_by(self, cut: _Cut, shared: SharedTexts) -> None:
        """Set which part of each context is read, and which texts pictures share."""
        if self.cut not in (None, cut):
            raise ConfigurationError(
                f"This model reads {cut.layers} layers of {cut.tokens} tokens here, but another number in a call that"
                " is still running. Run one after the other."
            )
        self.cut, self.shared = cut, shared

    def __call__(  # diffusers reads this signature and drops other arguments, so nn.Module.__call__ cannot serve
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
        stacks = self.shared.spread(self._cut_contexts(text, contexts), len(hidden_states))

        def run(queries: torch.Tensor, context: int) -> torch.Tensor:
            conditioning = with_text(stacks[:, context])
            masks = {} if ip_adapter_masks is None else {"ip_adapter_masks": ip_adapter_masks}
            return self.inner(attn, queries, conditioning, attention_mask=attention_mask, **masks)

        if placements is None:
            return run(hidden_states, 0)
        # An IP-Adapter's masks have one value for each position, so with them no position may be left out.
        return _blend_runs(run, hidden_states, placements, whole=ip_adapter_masks is not None)

    def _cut_contexts(self, text: torch.Tensor, count: int) -> torch.Tensor:
        """This layer's part of every context, shape (batch, contexts, tokens, dim)."""
        tokens = text.shape[-2]
        if tokens % count:
            raise ConfigurationError(
                f"The conditioning has {tokens} tokens; expected {count} contexts of equal length, the global"
                f" prompt's and {count - 1} regions'."
            )
        stacks = text.reshape(len(text), count, tokens // count, text.shape[-1])
        return stacks if self.cut is None or text.ndim == _PLAIN else self.cut.apply(stacks)

    def _attend(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        text: torch.Tensor,
        contexts: int,
        placements: list[Placement] | None,
    ) -> torch.Tensor:
        """Compute what `AttnProcessor2_0` does, for several contexts at once."""
        keys, values = self._get_keys_and_values(attn, text, contexts)
        queries = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))  # -> (batch, positions, heads, head)
        if placements is None:
            keys, values = (self.shared.spread(each[:, 0], len(queries)) for each in (keys, values))
            attended = dispatch_attention_fn(queries, keys, values)
        else:
            attended = _blend_contexts(queries, keys, values, placements)
        return _project_out(attn, attended)

    def _get_keys_and_values(self, attn: Any, text: torch.Tensor, contexts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all contexts, from the last step where they are known; see `_project`."""
        if torch.compiler.is_compiling():
            return self._project(attn, text, contexts)
        known = self._projected  # read once, as another thread may replace it
        if known is None or not known.fits(attn, text, contexts):
            keys, values = self._project(attn, text, contexts)
            known = _Projected(text, _count_changes(text), _read_strengths(attn), contexts, keys, values)
            self._projected = None if known.version is None or keys.requires_grad else known
        return known.keys, known.values

    def _project(self, attn: Any, text: torch.Tensor, contexts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute keys and values of all contexts, shape (batch, contexts, tokens, heads, head)."""
        stacks = self._cut_contexts(text, contexts)
        keys, values = (
            project(stacks.flatten(0, 1)).unflatten(0, stacks.shape[:2]).unflatten(-1, (attn.heads, -1))
            for project in (attn.to_k, attn.to_v)
        )
        return keys, values


class _IsolatingProcessor(_Wrapper):
    """Self-attention in which the queries of a region do not see the keys of another."""

    def __call__(  # diffusers reads this signature and drops other arguments, so nn.Module.__call__ cannot serve
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
    """A `_StackedProcessor` whose inner processor is a child, so that offloading and casts reach its weights."""


class _IsolatingModule(_IsolatingProcessor, nn.Module):
    """An `_IsolatingProcessor` whose inner processor is a child, so that offloading and casts reach its weights."""


_StackedProcessor.with_weights = _StackedModule
_IsolatingProcessor.with_weights = _IsolatingModule


def _attend_in_groups(attn: Any, hidden_states: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
    """Compute what `AttnProcessor2_0` does, each group with its own keys: no mask, which some backends do not take."""
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
    return _project_out(attn, attended)


@dataclass(frozen=True, eq=False)
class _Projected:
    """Keys and values with what they were computed from, kept because the text is the same in every step.

    They are not kept if gradients need the projection again, or if torch does not count changes of the text.
    """

    text: torch.Tensor
    version: int | None
    strengths: tuple[object, ...]
    contexts: int
    keys: torch.Tensor
    values: torch.Tensor

    def fits(self, attn: Any, text: torch.Tensor, contexts: int) -> bool:
        """Whether the text is this one, unchanged, and the LoRA strengths are the same."""
        same_text = self.text is text and self.version == _count_changes(text) and self.contexts == contexts
        return same_text and self.strengths == _read_strengths(attn)


def _count_changes(text: torch.Tensor) -> int | None:
    """How often a text was changed in place; None for inference tensors, of which torch does not count it."""
    return None if text.is_inference() else text._version


def _read_strengths(attn: Any) -> tuple[object, ...]:
    """The settings of LoRA layers that a callback may change between two steps."""
    return tuple(
        (tuple(layer.scaling.items()), tuple(layer.active_adapters), layer.disable_adapters, layer.merged)
        for layer in (attn.to_k, attn.to_v)
        if isinstance(layer, LoraLayer)
    )


def _is_plain(attn: Any, inner: _Processor) -> bool:
    """Whether the processor is diffusers' plain one, and the layer has no norm or residual that U-Nets do not use."""
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    return type(inner) is AttnProcessor2_0 and not any(extras) and not attn.residual_connection


def _project_out(attn: Any, attended: torch.Tensor) -> torch.Tensor:
    """Project heads (batch, positions, heads, head) to the layer's output (batch, positions, channels)."""
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
        keys: Shape (batch, contexts, tokens, heads, head).
        values: Same shape as the keys.
        placements: Which contexts hold where, each for some rows of the batch; together they cover all rows.

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
    """`_blend_contexts` for the rows of one plan: gather queries by context, attend, and put the outputs back."""
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
    """`_blend_contexts` for other processors, which `run(hidden_states, context)` calls.

    Args:
        run: Attention of some positions to one context.
        hidden_states: Shape (batch, positions, channels).
        placements: See `_blend_contexts`.
        whole: Whether the processor needs all positions at once.
    """
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
    """Split a conditioning into its text, and a function that puts another text in its place."""
    if isinstance(conditioning, tuple):
        text, images = conditioning
        return text, lambda other: (other, images)
    return conditioning, lambda other: other
