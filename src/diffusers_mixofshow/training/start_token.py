"""The start token, which is the same in every prompt: what the layers that read text see there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families import family_of


if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@torch.no_grad()
def start_token_inputs(pipeline: StableDiffusionPipeline, layers: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Directions of the inputs that layers have at a prompt's start token.

    CLIP reads from left to right, so that nothing which a prompt says reaches its start token. A layer whose update
    gives 0 there stays the base's there, and so does the input of the layer behind it.

    Args:
        pipeline: Whose text encoder is run; without effective updates, or with such that give 0 there.
        layers: Site name to layer of the pipeline's; those that do not read text are left out.

    Returns:
        Site name to unit vector, shape (in_features,), float32, on the text encoder's device.

    Raises:
        ConfigurationError: If the text encoder has no start token that is the same in every prompt.
    """
    seen: dict[str, torch.Tensor] = {}
    encoder: Any = pipeline.text_encoder
    start, end = pipeline.tokenizer.bos_token_id, pipeline.tokenizer.eos_token_id
    if start is None or end is None:
        raise ConfigurationError(_without_start("the tokenizer has no token for the start or the end of a prompt"))
    prompts = torch.tensor([[start, start], [start, end]], device=encoder.device)
    with ExitStack() as hooks:
        for site, layer in layers.items():
            if site.startswith("text_encoder."):
                hooks.callback(layer.register_forward_pre_hook(_make_hook(seen, site)).remove)
        encoded = encoder(prompts)[0]
    if not torch.allclose(encoded[0, 0], encoded[1, 0], rtol=1e-2, atol=1e-2):  # what bfloat16 rounds
        raise ConfigurationError(_without_start("what a prompt says reaches its start token"))
    seen |= {site: encoded for site in layers if family_of(pipeline.components).reads_text(site)}
    return {site: nn.functional.normalize(state[0, 0].float(), dim=0) for site, state in seen.items()}


def _make_hook(seen: dict[str, torch.Tensor], site: str) -> Any:
    def note(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[site] = inputs[0]

    return note


def _without_start(reason: str) -> str:
    return f"Updates cannot leave this base's start token alone: {reason}. Set keep_start_token to False."


def without_direction(matrix: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """M (I - x x^T): the matrix that gives 0 for x and the same as before for everything at right angles to it.

    Args:
        matrix: M, shape (out_features, in_features).
        direction: x, a unit vector, shape (in_features,).
    """
    return matrix - (matrix @ direction)[:, None] * direction
