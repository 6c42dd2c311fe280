"""What the tests of the page share: the embedded base, and files of concepts that fit it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusers_mixofshow import EDLoRA
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.families.layers import adapted_layers, embedding_layers
from diffusers_mixofshow.ui.session import Studio


@pytest.fixture(scope="session")
def studio() -> Studio:
    """The embedded base, loaded once; every test leaves it as it came."""
    return Studio("toyland", "cpu")


@pytest.fixture(scope="session")
def packs(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of two random concepts for the embedded base, by name."""
    folder = tmp_path_factory.mktemp("packs")
    return {name: write_pack(studio, folder / name, name, seed) for seed, name in enumerate(("rex", "tom"))}


def write_pack(studio: Studio, folder: Path, name: str, seed: int) -> Path:
    components = studio.pipe.components
    generator = torch.Generator().manual_seed(seed)
    concept, layers = Concept.from_name(name, "dog"), embedding_layers(components)
    width = components["text_encoder"].config.hidden_size
    edlora = EDLoRA(
        concepts=(concept,),
        embeddings={token: torch.randn(len(layers), width, generator=generator) for token in concept.tokens},
        lora={
            site: LowRank(
                down=0.1 * torch.randn(2, layer.in_features, generator=generator),
                up=0.1 * torch.randn(layer.out_features, 2, generator=generator),
                alpha=2.0,
            )
            for site, layer in adapted_layers(components).items()
        },
        base_model="toyland",
        layers=layers,
        training={"note": "<img src=x onerror=alert(1)>"},
    )
    return edlora.save_pretrained(folder)
