"""Tokenised prompts to layer-wise embeddings (section 3.3.1 of the paper, from P+)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from diffusers_mixofshow.conditioning.tokenize import TokenizedPrompts
from diffusers_mixofshow.errors import ConceptError


_concept_positions: ContextVar[torch.Tensor | None] = ContextVar("concept_positions", default=None)


def concept_positions() -> torch.Tensor | None:
    """Where concept embeddings stand in the text encoder's pass that runs right now, for hooks; ids cannot tell.

    Returns:
        True at the concepts' tokens, shape (prompts, tokens) of the pass, bool, on the CPU; None if it has none.
    """
    return _concept_positions.get()


def encode_layerwise(
    text_encoder: nn.Module,
    tokenized: TokenizedPrompts,
    embeddings: Mapping[str, torch.Tensor],
    layers: int,
    clip_skip: int | None = None,
    *,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Encode every prompt once for each cross-attention layer, with that layer's concept embeddings.

    A prompt that names no concept is the same for all layers; it is encoded once and repeated. Differentiable
    with respect to `embeddings` and the text encoder's parameters.

    Args:
        text_encoder: A CLIP text model of any transformers version; unchanged afterwards.
        tokenized: The prompts, see `tokenize`.
        embeddings: Concept token to its embeddings, shape (layers, dim).
        layers: Number of cross-attention layers of the denoiser.
        clip_skip: Number of last text layers to leave out, as in diffusers.
        device: Where to run, if the text encoder's parameters cannot tell (offload).

    Returns:
        Shape (prompts, layers * tokens, dim): the encodings for layer 0, 1, ... one after another.

    Raises:
        ConceptError: If an embedding is missing or has another number of layers or another width.
    """
    _check_embeddings(text_encoder, tokenized, embeddings, layers)
    device = torch.device(device) if device is not None else next(text_encoder.parameters()).device
    named = [row for row, names in enumerate(tokenized.concept_tokens) if names]
    plain = [row for row, names in enumerate(tokenized.concept_tokens) if not names]
    encoded = []
    if named:
        chosen = tokenized.select(named)
        ids, mask = (table.repeat_interleave(layers, dim=0) for table in (chosen.ids, chosen.attention_mask))
        with _concepts_written(text_encoder, chosen, embeddings, layers):
            states = _hidden_states(text_encoder, ids.to(device), mask.to(device), clip_skip)
        encoded.append(states.unflatten(0, (len(named), layers)).flatten(1, 2))
    if plain:
        chosen = tokenized.select(plain)
        states = _hidden_states(text_encoder, chosen.ids.to(device), chosen.attention_mask.to(device), clip_skip)
        encoded.append(states.repeat(1, layers, 1))
    order = torch.tensor([*named, *plain]).argsort().to(device)
    return torch.cat(encoded)[order.to(encoded[0].device)]


def _check_embeddings(
    text_encoder: Any, tokenized: TokenizedPrompts, embeddings: Mapping[str, torch.Tensor], layers: int
) -> None:
    width = text_encoder.get_input_embeddings().embedding_dim
    used = sorted({name for names in tokenized.concept_tokens for name in names.values()})
    defects = [f"{name} has no embedding" for name in used if name not in embeddings]
    defects += [
        f"{name} has an embedding of shape {tuple(embeddings[name].shape)}"
        for name in used
        if name in embeddings and embeddings[name].shape != (layers, width)
    ]
    if defects:
        raise ConceptError(
            f"Cannot encode the prompt: {'; '.join(defects)}. Expected shape (layers, dim) = ({layers}, {width}),"
            " as the concept's own base model has."
        )


@contextmanager
def _concepts_written(
    text_encoder: Any, tokenized: TokenizedPrompts, embeddings: Mapping[str, torch.Tensor], layers: int
) -> Iterator[None]:
    """Let the embedding layer answer with the concepts' rows, for ids of shape (prompts * layers, tokens)."""
    places = [
        (prompt, position, name)
        for prompt, names in enumerate(tokenized.concept_tokens)
        for position, name in names.items()
    ]
    rows = torch.tensor([prompt * layers + layer for prompt, _, _ in places for layer in range(layers)])
    columns = torch.tensor([position for _, position, _ in places for _ in range(layers)])

    def write(_module: nn.Module, _inputs: tuple[object, ...], output: torch.Tensor) -> torch.Tensor:
        if _concept_positions.get() is not positions:  # a pass of another thread, or inside of this one
            return output
        values = torch.cat([embeddings[name].to(output) for _, _, name in places])
        return output.index_put((rows.to(output.device), columns.to(output.device)), values)

    positions = torch.zeros(len(tokenized.ids) * layers, tokenized.ids.shape[1], dtype=torch.bool)
    positions[rows, columns] = True
    hook = text_encoder.get_input_embeddings().register_forward_hook(write)
    before = _concept_positions.set(positions)
    try:
        yield
    finally:
        _concept_positions.reset(before)
        hook.remove()


def _hidden_states(
    text_encoder: Any, ids: torch.Tensor, attention_mask: torch.Tensor, clip_skip: int | None
) -> torch.Tensor:
    """What cross-attention sees of the text, shape (prompts, tokens, dim)."""
    mask = attention_mask if getattr(text_encoder.config, "use_attention_mask", False) else None
    if clip_skip is None:
        return text_encoder(ids, attention_mask=mask)[0]
    hidden_states = text_encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    # transformers >= 5.6 has no text_model inside CLIPTextModel.
    inner = getattr(text_encoder, "text_model", text_encoder)
    return inner.final_layer_norm(hidden_states[-(clip_skip + 1)])
