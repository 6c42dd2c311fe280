"""The start token, which is the same in every prompt: inputs of text-reading layers there, kept free of updates."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from diffusers_mixofshow.conditioning.encode import encode
from diffusers_mixofshow.conditioning.tokenize import TokenizedPrompts
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families import TextEncoder, family_of


@torch.no_grad()
def start_token_inputs(pipeline: Any, layers: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Directions of the inputs that text-reading layers get at a prompt's start token.

    CLIP's attention is causal, so that states at the start token do not depend on the prompt. If a layer's update
    gives 0 for its input there, its output there, and so the input of the next layer, is the base model's.

    Args:
        pipeline: Its text encoders are run; their updates must be 0 or give 0 at the start token.
        layers: Site name to layer of the pipeline; layers that do not read text are ignored.

    Returns:
        Site name to unit vector, shape (in_features,), float32, on the text encoder's device.

    Raises:
        ConfigurationError: If a text encoder has no start token that is the same in every prompt.
    """
    components, family = pipeline.components, family_of(pipeline.components)
    seen: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for site, layer in layers.items():
            if site.partition(".")[0] in family.text_encoders:
                hooks.callback(layer.register_forward_pre_hook(_make_hook(seen, site)).remove)
        states = [
            _start_states(components[name], components[reading.tokenizer], reading)
            for name, reading in family.text_encoders.items()
        ]
    together = torch.cat([state.to(states[0]) for state in states], dim=-1)
    seen |= {site: together for site in layers if family.reads_text(site)}
    return {site: nn.functional.normalize(state[0, 0].float(), dim=0) for site, state in seen.items()}


def _start_states(encoder: Any, tokenizer: Any, reading: TextEncoder) -> torch.Tensor:
    """Encode two prompts of two tokens that share only the start token; states of shape (2, 2, dim)."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if start is None or end is None:
        raise ConfigurationError(
            _describe_missing_start("the tokenizer has no token for the start or the end of a prompt")
        )
    ids = torch.tensor([[start, start], [start, end]])
    states = encode(encoder, TokenizedPrompts(ids, torch.ones_like(ids), ({}, {})), {}, 1, reading=reading).states
    if not torch.allclose(states[0, 0], states[1, 0], rtol=1e-2, atol=1e-2):  # rounding of bfloat16
        raise ConfigurationError(_describe_missing_start("what a prompt says reaches its start token"))
    return states


def _make_hook(seen: dict[str, torch.Tensor], site: str) -> Any:
    def note(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[site] = inputs[0]

    return note


def _describe_missing_start(reason: str) -> str:
    return f"keep_start_token cannot be used with this base model: {reason}. Set keep_start_token to False."


def remove_direction(matrix: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """M (I - x x^T): the matrix that gives 0 for x, and the same as M for every vector orthogonal to x.

    Args:
        matrix: M, shape (out_features, in_features).
        direction: x, a unit vector, shape (in_features,).
    """
    return matrix - (matrix @ direction)[:, None] * direction
