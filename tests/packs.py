"""Random ED-LoRAs that fit a model, and the two spellings of its text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import torch
from transformers import CLIPTextModelWithProjection

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.edlora.embeddings import join_name
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.families.family import POOLED
from diffusers_mixofshow.families.layers import adapted_layers, embedding_layers


def random_pack(
    components: Mapping[str, Any],
    *concepts_or_names: str | Concept,
    ranks: tuple[int, ...] = (4,),
    alphas: tuple[float, ...] = (4.0,),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 0.3,
    base_model: str = "someone/tiny",
) -> EDLoRA:
    """Make a pack with an update on every site, by default of one concept, a dog called rex.

    Args:
        components: A pipeline's.
        concepts_or_names: Concepts; a name alone is that of a dog.
        ranks: Ranks of the updates, given to the sites in turn.
        alphas: Alphas of the updates, likewise.
        dtype: Of all tensors.
        seed: Of all values.
        scale: Standard deviation of all values.
        base_model: The base model that the pack names.
    """
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul(scale).to(dtype)

    def width(encoder: str) -> int:
        return components[encoder].get_input_embeddings().weight.shape[1]

    concepts = tuple(
        each if isinstance(each, Concept) else Concept.from_name(each, "dog", kind="pet")
        for each in concepts_or_names or ("rex",)
    )
    layers = embedding_layers(components)
    parts = family_of(components).embedding_parts
    shapes = zip(adapted_layers(components).items(), cycle(ranks), cycle(alphas))
    return EDLoRA(
        concepts=concepts,
        embeddings={
            join_name(token, part): values(1 if part == POOLED else len(layers), width(encoder))
            for concept in concepts
            for token in concept.tokens
            for part, encoder in parts.items()
        },
        lora={
            site: LowRank(down=values(rank, layer.in_features), up=values(layer.out_features, rank), alpha=alpha)
            for (site, layer), rank, alpha in shapes
        },
        base_model=base_model,
        layers=layers,
        training={"steps": 3, "loss": [0.5, 0.25], "note": "ünïcode"},
    )


def with_nested_text_encoder(components: dict[str, object]) -> dict[str, object]:
    """The same components with a text encoder with modules under ``text_model.``, as before transformers 5.6."""
    flat = components["text_encoder"]
    nested = CLIPTextModelWithProjection(flat.config).eval()
    state = {key.removeprefix("text_model."): value for key, value in flat.state_dict().items()}
    nested.text_model.load_state_dict(state)
    return components | {"text_encoder": nested}


def assert_same_pack(one: EDLoRA, other: EDLoRA) -> None:
    """Every field equal, tensors bit for bit and in the same dtype."""
    assert (one.concepts, one.base_model, one.layers) == (other.concepts, other.base_model, other.layers)
    assert dict(one.training) == dict(other.training)
    assert one.embeddings.keys() == other.embeddings.keys()
    assert one.lora.keys() == other.lora.keys()
    for token, rows in one.embeddings.items():
        assert_identical(rows, other.embeddings[token])
    for site, update in one.lora.items():
        assert update.alpha == other.lora[site].alpha
        assert_identical(update.down, other.lora[site].down)
        assert_identical(update.up, other.lora[site].up)


def assert_identical(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype
    assert torch.equal(one, other)
