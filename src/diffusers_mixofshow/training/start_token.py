"""The start token, which is the same in every prompt: what the layers that read text see there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffusers_mixofshow.sites import reads_text


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
    """
    seen: dict[str, torch.Tensor] = {}
    encoder: Any = pipeline.text_encoder
    with ExitStack() as hooks:
        for site in _of_text_encoder(layers):

            def note(_layer: nn.Module, inputs: tuple[torch.Tensor, ...], site: str = site) -> None:
                seen[site] = inputs[0]

            hooks.callback(layers[site].register_forward_pre_hook(note).remove)
        encoded = encoder(torch.tensor([[pipeline.tokenizer.bos_token_id]], device=encoder.device))[0]
    seen |= {site: encoded for site in layers if reads_text(site)}
    return {site: nn.functional.normalize(state[0, 0].float(), dim=0) for site, state in seen.items()}


def _of_text_encoder(sites: Iterable[str]) -> list[str]:
    return [site for site in sites if site.startswith("text_encoder.")]


def without_direction(matrix: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """M (I - x x^T): the matrix that gives 0 for x and the same as before for everything at right angles to it.

    Args:
        matrix: M, shape (out_features, in_features).
        direction: x, a unit vector, shape (in_features,).
    """
    return matrix - (matrix @ direction)[:, None] * direction
