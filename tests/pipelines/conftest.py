"""A tiny pipeline and concepts made for it, random but strong enough to see."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

import tiny
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.families.layers import adapted_layers, cross_attention_layers
from diffusers_mixofshow.pipelines import MixOfShowPipeline


SETTINGS = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}


@pytest.fixture
def components():
    return tiny.components()


@pytest.fixture
def pipe(components):
    pipeline = MixOfShowPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def parent(components):
    pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def make_pack(components):
    """A function from names to an ED-LoRA of these concepts."""

    def make(*names, seed=0):
        random = torch.Generator().manual_seed(seed)
        concepts = tuple(Concept.from_name(name, "man") for name in names)
        layers = cross_attention_layers(components["unet"])
        table = components["text_encoder"].get_input_embeddings().weight
        embeddings = {
            token: torch.randn(len(layers), table.shape[1], generator=random) * table.std().item() * 3
            for concept in concepts
            for token in concept.tokens
        }
        lora = {
            site: LowRank(
                down=torch.randn(2, layer.in_features, generator=random) * 0.2,
                up=torch.randn(layer.out_features, 2, generator=random) * 0.2,
                alpha=2.0,
            )
            for site, layer in adapted_layers(components).items()
        }
        return EDLoRA(concepts=concepts, embeddings=embeddings, lora=lora, base_model="tiny", layers=layers)

    return make


@pytest.fixture
def latents():
    """A function that runs a pipeline from a seed and returns its final latents."""

    def run(pipeline, prompt=None, seed=0, **settings):
        generator = torch.Generator().manual_seed(seed)
        return pipeline(prompt, **{"generator": generator, **SETTINGS, **settings}).images

    return run
