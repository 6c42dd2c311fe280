"""What a base model and its concepts take, computed from their shapes: no weights are there, and nothing is measured.

    python benchmarks/costs.py            # a Markdown table; some seconds on a CPU

Models are made of the published configurations on torch's ``meta`` device. A concept is one ED-LoRA as `train` writes
it (two tokens, rank 4, float32), a pack what `fuse` writes of several (float16, ranks added up). What a picture needs
besides weights depends on the device and is not told.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.families.family import POOLED
from diffusers_mixofshow.families.layers import adapted_layers, embedding_layers


RANK = 4
TOKENS = 2
MANY = 14


def text_encoder(kind: type, width: int, layers: int, heads: int, **more: Any) -> torch.nn.Module:
    return kind(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=heads, projection_dim=width, **more,
        )
    )  # fmt: skip


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def stable_diffusion() -> dict[str, torch.nn.Module]:
    return {
        "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        "text_encoder": text_encoder(CLIPTextModel, 768, 12, 12),
        "vae": autoencoder(),
    }


def stable_diffusion_xl() -> dict[str, torch.nn.Module]:
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return {
        "unet": unet,
        "text_encoder": text_encoder(CLIPTextModel, 768, 12, 12),
        "text_encoder_2": text_encoder(CLIPTextModelWithProjection, 1280, 32, 20, hidden_act="gelu"),
        "vae": autoencoder(),
    }


def numbers_of_a_concept(components: dict[str, Any]) -> tuple[int, int]:
    """How many numbers its updates have, and how many its embeddings."""
    adapted: dict[str, Any] = adapted_layers(components)
    updates = sum(RANK * (layer.in_features + layer.out_features) for layer in adapted.values())
    layers = len(embedding_layers(components))
    rows = 0
    for part, encoder in family_of(components).embedding_parts.items():
        width = components[encoder].get_input_embeddings().embedding_dim
        rows += TOKENS * width * (1 if part == POOLED else layers)
    return updates, rows


def costs(components: dict[str, torch.nn.Module]) -> dict[str, str]:
    """What stands in the table, by row."""
    weights = sum(values.numel() for model in components.values() for values in model.parameters())
    unet = sum(values.numel() for values in components["unet"].parameters())
    updates, rows = numbers_of_a_concept(components)
    return {
        "weights in float16: U-Net": f"{2 * unet / 1e9:.1f} GB",
        "weights in float16: all": f"{2 * weights / 1e9:.1f} GB",
        "layers with an update": str(len(adapted_layers(components))),
        "file of one concept, rank 4": f"{4 * (updates + rows) / 1e6:.1f} MB",
        f"file of {MANY} concepts fused": f"{MANY * (2 * updates + 4 * rows) / 1e6:.0f} MB",
    }


def main() -> None:
    with torch.device("meta"):
        found = {"Stable Diffusion 1.5": costs(stable_diffusion()), "SDXL": costs(stable_diffusion_xl())}
    print("| | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for row in next(iter(found.values())):
        print(f"| {row} | " + " | ".join(values[row] for values in found.values()) + " |")


if __name__ == "__main__":
    main()
