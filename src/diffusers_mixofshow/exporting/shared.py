"""Convert a layer-wise concept to one whose tokens have one embedding for all layers, with its base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from diffusers_mixofshow.conditioning.encode import encode
from diffusers_mixofshow.conditioning.tokenize import tokenize
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.embeddings import rows_for
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.exporting.absorption import Absorbed, Metric, absorb
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.families.layers import cross_attention_layers, linear_layers
from diffusers_mixofshow.fusion.prompts import PromptSet, prior_prompts, recording_prompts
from diffusers_mixofshow.interop.conversion import SHARED_KEPT
from diffusers_mixofshow.interop.textual_inversion import is_layerwise, mean_over_layers
from diffusers_mixofshow.lora import merged
from diffusers_mixofshow.progress import progress


RANK_OF_A_CONCEPT = 8
"""Rank that is added to the updates of keys and values for every concept."""


@torch.no_grad()
def share_layers(pipe: Any, edlora: EDLoRA, prompts: PromptSet | None = None) -> EDLoRA:
    """Give every token one embedding for all layers, and put the effect of the layers' own embeddings into the LoRA.

    The embedding is the mean over layers; by itself it would lose most of the identity. The effect of each
    cross-attention layer's own embedding on its keys and values, in prompts that name the concept, is fitted by least
    squares as a low-rank update of their weights (see `absorption`). Any program that reads LoRAs can use the result.
    With SDXL, the embeddings for the pooled vector of the whole text stay as they are; other programs have none.

    Args:
        pipe: The base model that the concepts were tuned on, a Stable Diffusion pipeline; it is unchanged afterwards.
            Concepts loaded into it are set aside meanwhile.
        edlora: A concept, or a fused pack.
        prompts: Templates with ``<TOK>``, for all concepts or by kind; by default those that fusion records.

    Returns:
        The same concepts with equal embeddings in all layers; the share of the effect that is kept, from 0 to 1, is in
        `EDLoRA.training` under ``shared_layers_kept``. An ED-LoRA whose embeddings are already equal is returned
        unchanged.

    Raises:
        EDLoRAFormatError: If it does not fit the model.
        FusionError: If a prompt does not name the concept.
        ConfigurationError: If other adapters are active in the model.
    """
    if not is_layerwise(edlora):
        return edlora
    edlora.check_fits(pipe.components)
    # The embedding for the pooled vector, which has no layers, stays as it is.
    means = {name: mean_over_layers(rows) for name, rows in edlora.embeddings.items()}
    asked, neutral = _list_prompts(edlora, prompts)
    steps = 2 * len(asked) + len(neutral) + len(edlora.layers)
    with (
        _require_bare_base(pipe),
        merged(pipe.components, edlora),
        progress("Sharing layers", steps, pipe=pipe) as bar,
    ):
        own = _encode_states(pipe, edlora, asked, edlora.embeddings, bar)
        once = {name: mean[None] for name, mean in means.items()}
        shared, others = (_encode_states(pipe, edlora, texts, once, bar).flatten(0, 2) for texts in (asked, neutral))
        updates = _fit_updates(pipe.components, edlora, own, Metric.of(shared, others), bar)
    kept = sum(update.kept for update in updates.values()) / len(updates)
    return replace(
        edlora,
        embeddings={name: means[name].expand_as(rows).clone() for name, rows in edlora.embeddings.items()},
        lora={**edlora.lora, **{site: _append_update(edlora, site, update) for site, update in updates.items()}},
        training={**edlora.training, SHARED_KEPT: round(kept, 4)},
    )


@contextmanager
def _require_bare_base(pipe: Any) -> Iterator[None]:
    """Set loaded concepts aside inside the block; refuse other active adapters, whose updates would count twice."""
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


def _list_prompts(edlora: EDLoRA, prompts: PromptSet | None) -> tuple[list[str], list[str]]:
    """List prompts that name a concept; and prompts that do not: the same with class words, and general captions."""
    asked: list[str] = []
    neutral: list[str] = []
    for concept in edlora.concepts:
        named = recording_prompts(concept, prompts)
        asked += named
        neutral += [prompt.replace(concept.placeholder, concept.class_word) for prompt in named]
    return asked, [*neutral, *prior_prompts(edlora.concepts)]


def _encode_states(
    pipe: Any, edlora: EDLoRA, prompts: Sequence[str], embeddings: Mapping[str, torch.Tensor], bar: Any
) -> torch.Tensor:
    """Encode prompts with every row of the embeddings; shape (prompts, rows, tokens, dim), float64 on the CPU."""
    components, family = pipe.components, family_of(pipe.components)
    rows = max(len(each) for each in embeddings.values())  # the pooled vector has one alone
    own = {name: rows_for(name, embeddings, family) for name in family.text_encoders}
    encoded = []
    for prompt in prompts:
        states = []
        for name, reading in family.text_encoders.items():
            tokens = tokenize([prompt], components[reading.tokenizer], edlora.concepts)
            states.append(encode(components[name], tokens, own[name], rows, reading=reading).states)
        encoded.append(torch.cat(states, dim=-1))
        bar.update()
    return torch.cat(encoded).cpu().double().unflatten(1, (rows, -1))


def _fit_updates(
    components: Mapping[str, object], edlora: EDLoRA, own: torch.Tensor, metric: Metric, bar: Any
) -> dict[str, Absorbed]:
    """Fit the update of each site: keys and values of every cross-attention layer, with its group's embedding."""
    modules, rank = linear_layers(components), RANK_OF_A_CONCEPT * len(edlora.concepts)
    family = family_of(components)
    denoiser: Any = components[family.denoiser]
    paths = cross_attention_layers(denoiser)
    updates = {}
    for number, layer in enumerate(edlora.layers):
        own_states = own[:, number].flatten(0, 1)
        for path in (path for path in paths if family.embedding_layer_of(path) == layer):
            for site in (f"{family.denoiser}.{path}.to_k", f"{family.denoiser}.{path}.to_v"):
                weight = modules[site].get_parameter("weight").cpu()
                updates[site] = absorb(weight, own_states, metric, rank)
        bar.update()
    return updates


def _append_update(edlora: EDLoRA, site: str, update: Absorbed) -> LowRank:
    """Add the new update to the concept's own update of the site, as one of the sum of their ranks."""
    dtype = next(iter(edlora.embeddings.values())).dtype
    down, up = update.down.to(dtype), update.up.to(dtype)
    if site in edlora.lora:
        before = edlora.lora[site].folded
        down, up = torch.cat([before.down.cpu(), down]), torch.cat([before.up.cpu(), up], dim=1)
    return LowRank(down=down, up=up, alpha=float(len(down)))
