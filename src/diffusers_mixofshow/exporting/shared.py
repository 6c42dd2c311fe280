"""A concept whose tokens have one embedding for all layers, made of a layer-wise one and its base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from diffusers_mixofshow.conditioning.encode import encode_layerwise
from diffusers_mixofshow.conditioning.tokenize import tokenize
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.embeddings import split_name
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import ConfigurationError, EDLoRAFormatError
from diffusers_mixofshow.exporting.absorption import Absorbed, Metric, absorb
from diffusers_mixofshow.families.layers import linear_layers
from diffusers_mixofshow.fusion.prompts import PromptSet, prior_prompts, recording_prompts
from diffusers_mixofshow.interop.conversion import SHARED_KEPT
from diffusers_mixofshow.interop.textual_inversion import is_layerwise, mean_over_layers
from diffusers_mixofshow.lora import merged
from diffusers_mixofshow.progress import progress


RANK_OF_A_CONCEPT = 8
"""Rank that the updates of keys and values gain for every concept."""


@torch.no_grad()
def share_layers(pipe: Any, edlora: EDLoRA, prompts: PromptSet | None = None) -> EDLoRA:
    """Give every token one embedding for all layers, and put what the layers' own did into the LoRA.

    The embedding is the mean; by itself it would lose most of the identity. What each cross-attention layer's own
    embedding did to the layer's keys and values, in prompts that name the concept, is fitted by least squares as a
    low-rank update of their weights (see `absorption`). Any program can draw the result.

    Args:
        pipe: The base model that the concepts were tuned on, a Stable Diffusion pipeline; it leaves as it came.
            Concepts that it has loaded are set aside meanwhile.
        edlora: A concept, or a fused pack.
        prompts: Templates with ``<TOK>``, for all concepts or by kind; by default those that fusion records.

    Returns:
        The same concepts with equal embeddings in all layers; how much of what the own ones did is kept, from 0 to 1,
        is in `EDLoRA.training` under ``shared_layers_kept``. An ED-LoRA whose embeddings are equal already is returned
        as it is.

    Raises:
        EDLoRAFormatError: If it does not fit the model, or has embeddings for several text encoders.
        FusionError: If a prompt does not name the concept.
        ConfigurationError: If other adapters are active in the model.
    """
    if not is_layerwise(edlora):
        return edlora
    if any(split_name(name)[0] for name in edlora.embeddings):
        raise EDLoRAFormatError(
            "What layer-wise embeddings do can be put into the LoRA for Stable Diffusion 1.x and 2.x alone, but "
            f"{edlora!r} has embeddings for several text encoders. Convert it without a base model: their means are "
            "written."
        )
    means = {token: mean_over_layers(rows) for token, rows in edlora.embeddings.items()}
    asked, neutral = _prompts(edlora, prompts)
    steps = 2 * len(asked) + len(neutral) + len(edlora.layers)
    with (
        _base_alone(pipe),
        merged(pipe.components, edlora),
        progress("Sharing layers", steps, pipe=pipe) as bar,
    ):
        own = _states(pipe, edlora, asked, edlora.embeddings, bar)
        once = {token: mean[None] for token, mean in means.items()}
        shared, others = (_states(pipe, edlora, texts, once, bar).flatten(0, 2) for texts in (asked, neutral))
        updates = _updates(pipe.components, edlora, own, Metric.of(shared, others), bar)
    kept = sum(update.kept for update in updates.values()) / len(updates)
    return replace(
        edlora,
        embeddings={token: mean.expand(len(edlora.layers), -1).clone() for token, mean in means.items()},
        lora={**edlora.lora, **{site: _beside(edlora, site, update) for site, update in updates.items()}},
        training={**edlora.training, SHARED_KEPT: round(kept, 4)},
    )


@contextmanager
def _base_alone(pipe: Any) -> Iterator[None]:
    """The model without what is loaded into it: an update that is there already would count twice."""
    with pipe.set_concepts_aside() if hasattr(pipe, "set_concepts_aside") else nullcontext():
        models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
        layers = [layer for model in models for layer in model.modules() if isinstance(layer, LoraLayer)]
        acting = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
        acting.update(name for layer in layers for name in layer.merged_adapters)
        if acting:
            raise ConfigurationError(
                f"The base model has adapters that change it: {', '.join(sorted(acting))}. Take them out, or give a "
                "pipeline without them."
            )
        yield


def _prompts(edlora: EDLoRA, prompts: PromptSet | None) -> tuple[list[str], list[str]]:
    """Prompts that name a concept, and the same with class words, beside captions of anything."""
    asked: list[str] = []
    neutral: list[str] = []
    for concept in edlora.concepts:
        named = recording_prompts(concept, prompts)
        asked += named
        neutral += [prompt.replace(concept.placeholder, concept.class_word) for prompt in named]
    return asked, [*neutral, *prior_prompts(edlora.concepts)]


def _states(
    pipe: Any, edlora: EDLoRA, prompts: Sequence[str], embeddings: Mapping[str, torch.Tensor], bar: Any
) -> torch.Tensor:
    """States of the text for every row of the embeddings, shape (prompts, rows, tokens, dim), float64 on the CPU."""
    rows = len(next(iter(embeddings.values())))
    encoded = []
    for prompt in prompts:
        tokens = tokenize([prompt], pipe.tokenizer, edlora.concepts)
        encoded.append(encode_layerwise(pipe.text_encoder, tokens, embeddings, rows))
        bar.update()
    return torch.cat(encoded).cpu().double().unflatten(1, (rows, -1))


def _updates(
    components: Mapping[str, object], edlora: EDLoRA, own: torch.Tensor, metric: Metric, bar: Any
) -> dict[str, Absorbed]:
    """Site to what it gains, for keys and values of every cross-attention layer."""
    modules, rank = linear_layers(components), RANK_OF_A_CONCEPT * len(edlora.concepts)
    updates = {}
    for number, layer in enumerate(edlora.layers):
        for half in ("to_k", "to_v"):
            site = f"unet.{layer}.{half}"
            weight = modules[site].get_parameter("weight").cpu()
            updates[site] = absorb(weight, own[:, number].flatten(0, 1), metric, rank)
        bar.update()
    return updates


def _beside(edlora: EDLoRA, site: str, update: Absorbed) -> LowRank:
    """The concept's own update of a layer and the new one, as one."""
    dtype = next(iter(edlora.embeddings.values())).dtype
    down, up = update.down.to(dtype), update.up.to(dtype)
    if site in edlora.lora:
        before = edlora.lora[site].folded
        down, up = torch.cat([before.down.cpu(), down]), torch.cat([before.up.cpu(), up], dim=1)
    return LowRank(down=down, up=up, alpha=float(len(down)))
