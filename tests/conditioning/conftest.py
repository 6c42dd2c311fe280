"""A tiny model's parts and layer-wise embeddings for one concept."""

import pytest
import torch

import tiny
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.families.layers import cross_attention_layers


@pytest.fixture
def components():
    return tiny.components()


@pytest.fixture
def unet(components):
    return components["unet"]


@pytest.fixture
def text_encoder(components):
    return components["text_encoder"]


@pytest.fixture
def tokenizer(components):
    return components["tokenizer"]


@pytest.fixture
def layers(unet):
    return len(cross_attention_layers(unet))


@pytest.fixture
def concept():
    return Concept.from_name("potter", "man")


@pytest.fixture
def embeddings(concept, text_encoder, layers):
    random = torch.Generator().manual_seed(0)
    width = text_encoder.get_input_embeddings().embedding_dim
    return {token: torch.randn(layers, width, generator=random) * 0.05 for token in concept.tokens}
