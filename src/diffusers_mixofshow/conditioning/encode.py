"""Encode tokenised prompts to layer-wise embeddings (section 3.3.1 of the paper, from P+)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from diffusers_mixofshow.conditioning.tokenize import TokenizedPrompts
from diffusers_mixofshow.errors import ConceptError
from diffusers_mixofshow.families import TextEncoder
from diffusers_mixofshow.families.clip import clip_text_encoder


_PLAIN = clip_text_encoder("tokenizer")

_concept_positions: ContextVar[torch.Tensor | None] = ContextVar("concept_positions", default=None)


def concept_positions() -> torch.Tensor | None:
    """Positions of concept embeddings in the text encoder's current pass; for hooks, which see only stand-in ids.

    Returns:
        True at the concepts' tokens, shape (prompts, tokens) of the pass, bool, on the CPU; None without concepts.
    """
    return _concept_positions.get()


@dataclass(frozen=True, eq=False)
class Encoded:
    """Prompts as a denoiser reads them.

    Args:
        states: The encodings for layer 0, 1, ... one after another, shape (prompts, layers * tokens, dim).
        pooled: Vector of each whole prompt, shape (prompts, dim); None where the denoiser reads none.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None

    @classmethod
    def join_encoders(cls, parts: Sequence[Self]) -> Self:
        """Join the encodings of the same prompts by several text encoders; at most one of them gives vectors."""
        states = torch.cat([part.states.to(parts[0].states) for part in parts], dim=-1)
        return cls(states, next((part.pooled for part in parts if part.pooled is not None), None))

    @classmethod
    def join_prompts(cls, prompts: Sequence[Self]) -> Self:
        """Join prompts that were encoded separately."""
        pooled = [each.pooled for each in prompts if each.pooled is not None]
        return cls(torch.cat([each.states for each in prompts]), torch.cat(pooled) if pooled else None)

    def to(self, device: torch.device | str) -> Encoded:
        """Move everything to a device."""
        return Encoded(self.states.to(device), None if self.pooled is None else self.pooled.to(device))

    def keep_where(self, wanted: Sequence[bool]) -> Encoded:
        """Keep the prompts that are wanted, and replace the others by zeros."""
        if all(wanted):
            return self
        kept = torch.tensor(wanted, device=self.states.device)[:, None]
        return Encoded(
            self.states * kept[..., None], None if self.pooled is None else self.pooled * kept.to(self.pooled.device)
        )

    def select(self, numbers: Sequence[int]) -> Encoded:
        """Pick some of the prompts by their numbers."""
        chosen = list(numbers)
        return Encoded(self.states[chosen], None if self.pooled is None else self.pooled[chosen])


def encode(
    text_encoder: nn.Module,
    tokenized: TokenizedPrompts,
    embeddings: Mapping[str, torch.Tensor],
    layers: int,
    clip_skip: int | None = None,
    *,
    reading: TextEncoder = _PLAIN,
    device: torch.device | str | None = None,
) -> Encoded:
    """Encode every prompt once for each cross-attention layer, with that layer's concept embeddings.

    A prompt that names no concept is the same for all layers; it is encoded once and repeated. Differentiable
    with respect to `embeddings` and the text encoder's parameters.

    Args:
        text_encoder: A CLIP text model of any transformers version; unchanged afterwards.
        tokenized: The prompts, see `tokenize`.
        embeddings: Concept token to its embeddings, shape (layers, dim); if the pooled vector is read, (layers + 1,
            dim) with the embedding for it last.
        layers: Number of cross-attention layers of the denoiser, or of their groups.
        clip_skip: Number of last text layers to leave out, as in diffusers.
        reading: What the denoiser reads of this text encoder.
        device: Where to run, if the parameters are elsewhere because of offloading.

    Raises:
        ConceptError: If an embedding is missing or has another number of layers or another width.
    """
    times = layers + reading.pooled
    _check_embeddings(text_encoder, tokenized, embeddings, times)
    device = torch.device(device) if device is not None else next(text_encoder.parameters()).device
    named = [row for row, names in enumerate(tokenized.concept_tokens) if names]
    plain = [row for row, names in enumerate(tokenized.concept_tokens) if not names]
    states, pooled = [], []
    if named:
        chosen = tokenized.select(named)
        ids, mask = (table.repeat_interleave(times, dim=0) for table in (chosen.ids, chosen.attention_mask))
        with _write_concepts(text_encoder, chosen, embeddings, times):
            encoded = _run_encoder(text_encoder, ids.to(device), mask.to(device), clip_skip, reading)
        states.append(encoded.states.unflatten(0, (len(named), times))[:, :layers].flatten(1, 2))
        pooled += [] if encoded.pooled is None else [encoded.pooled[layers::times]]
    if plain:
        chosen = tokenized.select(plain)
        ids, mask = chosen.ids.to(device), chosen.attention_mask.to(device)
        encoded = _run_encoder(text_encoder, ids, mask, clip_skip, reading)
        states.append(encoded.states.repeat(1, layers, 1))
        pooled += [] if encoded.pooled is None else [encoded.pooled]
    order = torch.tensor([*named, *plain]).argsort().to(states[0].device)
    return Encoded(torch.cat(states)[order], torch.cat(pooled)[order] if pooled else None)


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
def _write_concepts(
    text_encoder: Any, tokenized: TokenizedPrompts, embeddings: Mapping[str, torch.Tensor], layers: int
) -> Iterator[None]:
    """Let the embedding layer return the concepts' embeddings at their tokens, for ids (prompts * layers, tokens)."""
    places = [
        (prompt, position, name)
        for prompt, names in enumerate(tokenized.concept_tokens)
        for position, name in names.items()
    ]
    rows = torch.tensor([prompt * layers + layer for prompt, _, _ in places for layer in range(layers)])
    columns = torch.tensor([position for _, position, _ in places for _ in range(layers)])

    def write(_module: nn.Module, _inputs: tuple[object, ...], output: torch.Tensor) -> torch.Tensor:
        if _concept_positions.get() is not positions:  # a pass of another thread, or one nested in this
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


def _run_encoder(
    text_encoder: Any, ids: torch.Tensor, attention_mask: torch.Tensor, clip_skip: int | None, reading: TextEncoder
) -> Encoded:
    """Encode ids to what the denoiser reads of them: states (prompts, tokens, dim), and the pooled vectors."""
    mask = attention_mask if getattr(text_encoder.config, "use_attention_mask", False) else None
    if clip_skip is None and reading.final_norm and not reading.skipped:
        return Encoded(text_encoder(ids, attention_mask=mask)[0], None)
    output = text_encoder(ids, attention_mask=mask, output_hidden_states=True)
    states = output.hidden_states[-(1 + reading.skipped + (clip_skip or 0))]
    if reading.final_norm:
        # transformers >= 5.6 has no text_model inside CLIPTextModel.
        states = getattr(text_encoder, "text_model", text_encoder).final_layer_norm(states)
    return Encoded(states, output.text_embeds if reading.pooled else None)
