"""Attention processors that read their own part of a stacked conditioning, installed for the time of a call.

A conditioning is always 3-D, so that every check, repeat and concatenation of diffusers works on it unmodified:
(batch, contexts * layers * tokens, dim). Contexts are the global prompt and the regions, outermost; inside each
context stand the encodings for layer 0, 1, ... (see `encode`). `regional_attention` cuts by context and
`layerwise_attention` by layer; each wraps whatever processor was there, an IP-Adapter's included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from diffusers_mixofshow.errors import ConfigurationError, RegionError
from diffusers_mixofshow.regions import Region, feature_grids, region_weights
from diffusers_mixofshow.sites import cross_attention_layers


# Three thirds are not quite one in float32; what is left is not the global prompt's.
_ROUNDING = 1e-5

# With an IP-Adapter the text comes together with a list of image embeddings.
_Conditioning = torch.Tensor | tuple[torch.Tensor, object]
_Processor = Callable[..., torch.Tensor]


@dataclass(frozen=True, eq=False)
class RegionPlan:
    """Which context holds where, on every feature map.

    Args:
        regions: The regions; context 0 is the global prompt, context i + 1 is region i.
    """

    regions: Sequence[Region]
    _known: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def contexts(self) -> int:
        """Number of contexts: the regions and the global prompt."""
        return 1 + len(self.regions)

    def weights(self, height: int, width: int) -> torch.Tensor:
        """Weights of all contexts on a feature map, shape (contexts, height * width); they sum to 1 in each cell."""
        if (height, width) not in self._known:
            shares = region_weights(self.regions, height, width).flatten(1)
            rest = 1 - shares.sum(dim=0, keepdim=True)
            rest = rest.where(rest > _ROUNDING, 0)
            self._known[height, width] = torch.cat([rest, shares])
        return self._known[height, width]


@contextmanager
def layerwise_attention(denoiser: nn.Module, tokens: int = 77, layers: int | None = None) -> Iterator[None]:
    """Let every cross-attention layer see its own part of a layer-wise conditioning.

    Inside, the denoiser takes `encoder_hidden_states` of shape (batch, layers * tokens, dim), or
    (batch, tokens, dim) as before. Afterwards it has its own processors back.

    Args:
        denoiser: A U-Net, or a ControlNet made from one.
        tokens: Tokens of one encoding.
        layers: Number of layers in the conditioning; those of the denoiser by default. A ControlNet needs it:
            its layers are the first ones of its U-Net.
    """
    paths = cross_attention_layers(denoiser)
    layers = len(paths) if layers is None else layers
    processors = {
        path: partial(_LayerwiseProcessor, layer=layer, layers=layers, tokens=tokens)
        for layer, path in enumerate(paths)
    }
    with _processors_wrapped(denoiser, processors):
        yield


@contextmanager
def regional_attention(denoiser: nn.Module, plan: RegionPlan) -> Iterator[None]:
    """Blend the cross-attention of all contexts by the plan's weights (section 3.4).

    out[p] = sum_c w_c[p] Attn(Q[p], K_c, V_c), each context computed only where its weight is not 0. Inside, the
    denoiser takes `encoder_hidden_states` of shape (batch, plan.contexts * n, dim). To combine it with
    `layerwise_attention`, enter that first.

    Args:
        denoiser: A U-Net or ControlNet.
        plan: The regions.
    """
    canvas = _Canvas(plan)
    hook = denoiser.register_forward_pre_hook(canvas.note_size, with_kwargs=True)
    wrap = partial(_RegionalProcessor, canvas=canvas)
    try:
        with _processors_wrapped(denoiser, dict.fromkeys(cross_attention_layers(denoiser), wrap)):
            yield
    finally:
        hook.remove()


@contextmanager
def _processors_wrapped(
    denoiser: nn.Module, wrappers: Mapping[str, Callable[[_Processor], _Processor]]
) -> Iterator[None]:
    layers: dict[str, Any] = {path: denoiser.get_submodule(path) for path in wrappers}
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


class _WrappingProcessor(nn.Module):
    """Keeps the inner processor a child of the model, so that offload and dtype changes reach its weights."""

    def __init__(self, inner: _Processor) -> None:
        super().__init__()
        self.inner = inner


class _LayerwiseProcessor(_WrappingProcessor):
    """Hands layer k the k-th part of the conditioning."""

    def __init__(self, inner: _Processor, *, layer: int, layers: int, tokens: int) -> None:
        super().__init__(inner)
        self.layer, self.layers, self.tokens = layer, layers, tokens

    def __call__(  # Attention looks at this signature, so nn.Module's own __call__ does not do.
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: _Conditioning,
        attention_mask: torch.Tensor | None = None,
        ip_adapter_masks: object = None,
    ) -> torch.Tensor:
        text, with_text = _split(encoder_hidden_states)
        if text.shape[1] == self.layers * self.tokens:
            text = text[:, self.layer * self.tokens : (self.layer + 1) * self.tokens]
        elif text.shape[1] != self.tokens:
            raise ConfigurationError(
                f"The conditioning has {text.shape[1]} tokens; expected {self.tokens}, or {self.layers} layers of"
                f" {self.tokens}. Encode it with the pipeline that uses it."
            )
        return _run(self.inner, attn, hidden_states, with_text(text), attention_mask, ip_adapter_masks)


class _RegionalProcessor(_WrappingProcessor):
    """Runs the inner processor for each context at that context's positions, and blends."""

    def __init__(self, inner: _Processor, *, canvas: _Canvas) -> None:
        super().__init__(inner)
        self.canvas = canvas

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: _Conditioning,
        attention_mask: torch.Tensor | None = None,
        ip_adapter_masks: object = None,
    ) -> torch.Tensor:
        text, with_text = _split(encoder_hidden_states)
        count, positions = self.canvas.plan.contexts, hidden_states.shape[1]
        if text.shape[1] % count:
            raise ConfigurationError(
                f"The conditioning has {text.shape[1]} tokens; expected {count} contexts of equal length, the global"
                f" prompt's and {count - 1} regions'."
            )
        blended = torch.zeros_like(hidden_states)
        for context, where, shares in self.canvas.shares(hidden_states):
            stack = text.unflatten(1, (count, -1))[:, context]
            # An IP-Adapter's masks have one value for each position, so with them no position may be left out.
            everywhere = len(where) == positions or ip_adapter_masks is not None
            queries = hidden_states if everywhere else hidden_states[:, where]
            output = _run(self.inner, attn, queries, with_text(stack), attention_mask, ip_adapter_masks)
            if everywhere and len(where) < positions:
                output = output[:, where]
            blended = blended.index_add(1, where, (output * shares.to(output)[:, None]).to(blended))
        return blended


class _Canvas:
    """The plan on the feature maps of the forward pass under way."""

    def __init__(self, plan: RegionPlan) -> None:
        self.plan = plan
        self._grids: dict[int, tuple[int, int]] = {}
        self._known: dict[tuple[tuple[int, int], torch.device], list[tuple[int, torch.Tensor, torch.Tensor]]] = {}

    def note_size(
        self, _denoiser: nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]
    ) -> None:
        """Read the latent's size off the denoiser's arguments."""
        sample = inputs[0] if inputs else named["sample"]
        height, width = sample.shape[-2:]
        self._grids = feature_grids(height, width)

    def shares(self, queries: torch.Tensor) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Contexts that hold anywhere on the feature map of queries (batch, positions, channels).

        Returns:
            The context's number, the positions that it reaches, and its weight at each of these.
        """
        grid = self._grids.get(queries.shape[1])
        if grid is None:
            raise RegionError(
                f"A layer has {queries.shape[1]} positions, but the latent's feature maps have"
                f" {sorted(self._grids)}. Regions need a U-Net that halves its feature maps."
            )
        key = (grid, queries.device)
        if key not in self._known:
            reached = [(context, row.nonzero()[:, 0], row) for context, row in enumerate(self.plan.weights(*grid))]
            self._known[key] = [
                (context, where.to(queries.device), row[where].to(queries.device))
                for context, where, row in reached
                if len(where)
            ]
        return self._known[key]


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
