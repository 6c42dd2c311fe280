"""Files as other programs write them, made of random numbers; what is in them is returned."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def original(path: Path, *, research: bool = False, tokens: tuple[str, ...] = ("<rex1>", "<rex2>")) -> dict:
    """A checkpoint of the authors' code for Stable Diffusion 1.x: one text and two U-Net layers, 16 rows a token."""
    generator = torch.Generator().manual_seed(1)
    separator, dot = ("_", "lora.") if research else (".", "lora_")
    layers = {
        "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj": (768, 768)},
        "unet": {
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (1280, 768),
            "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0": (1280, 1280),
        },
    }
    params: dict = {
        "new_concept_token" if research else "new_concept_embedding": {
            token: torch.randn(16, 768, generator=generator) for token in tokens
        }
    }
    for component, shapes in layers.items():
        params[component] = {}
        for layer, (wide, narrow) in shapes.items():
            params[component][f"{layer}{separator}{dot}down.weight"] = torch.randn(2, narrow, generator=generator)
            params[component][f"{layer}{separator}{dot}up.weight"] = torch.randn(wide, 2, generator=generator)
    torch.save({"params": params}, path)
    return params


def kohya(path: Path, *, bundled: bool = False) -> dict[str, torch.Tensor]:
    """A LoRA of kohya's trainer on a text layer and a 1 x 1 convolution, with different ranks and alphas."""
    generator = torch.Generator().manual_seed(2)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half()

    text, convolution = "lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{text}.lora_down.weight": values(4, 768),
        f"{text}.lora_up.weight": values(3072, 4),
        f"{text}.alpha": torch.tensor(1.0),
        f"{convolution}.lora_down.weight": values(2, 1280, 1, 1),
        f"{convolution}.lora_up.weight": values(1280, 2, 1, 1),
        f"{convolution}.alpha": torch.tensor(2.0),
    }
    if bundled:
        tensors["bundle_emb.rex.string_to_param.*"] = values(2, 768)
    save_file(tensors, path, metadata={"ss_network_dim": "4", "ss_base_model_version": "sd_v1"})
    return tensors
