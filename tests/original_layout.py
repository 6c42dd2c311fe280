"""Write a Stable Diffusion XL pipeline as a checkpoint of one file, in the layout of the original code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OF_AUTOENCODER = {
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}
_OF_TEXT_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OF_TEXTS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def write_original(pipe: Any, file: Path) -> Path:
    """Write U-Net, autoencoder and both text encoders."""
    tensors = {f"model.diffusion_model.{name}": each for name, each in _unet(pipe.unet)}
    tensors |= {f"first_stage_model.{name}": each for name, each in _autoencoder(pipe.vae)}
    first = {name.removeprefix("text_model."): each for name, each in pipe.text_encoder.state_dict().items()}
    tensors |= {f"conditioner.embedders.0.transformer.text_model.{name}": each for name, each in first.items()}
    second = pipe.text_encoder_2.state_dict()
    tensors |= {f"conditioner.embedders.1.model.{name}": each for name, each in _second_text_encoder(second)}
    save_file({name: each.contiguous() for name, each in tensors.items()}, file)
    return file


def _unet(unet: Any) -> Iterator[tuple[str, torch.Tensor]]:
    layers = unet.config.layers_per_block
    for name, tensor in unet.state_dict().items():
        path, _, kind = name.rpartition(".")
        if path in _ENDS:
            yield f"{_ENDS[path]}.{kind}", tensor
            continue
        found = re.fullmatch(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name)
        stage, block, part, number, rest = found.groups()
        number = int(number)
        if part == "resnets":
            rest = re.sub(r"^\w+", lambda match: _RESNETS[match[0]], rest)
        if stage == "mid":
            yield f"middle_block.{2 * number if part == 'resnets' else 1}.{rest}", tensor
        elif stage == "down":
            place = 1 + int(block) * (layers + 1) + (layers if part == "downsamplers" else number)
            rest = rest.replace("conv.", "op.") if part == "downsamplers" else rest
            yield f"input_blocks.{place}.{int(part == 'attentions')}.{rest}", tensor
        else:
            place = int(block) * (layers + 1) + (layers if part == "upsamplers" else number)
            has_attention = hasattr(unet.up_blocks[int(block)], "attentions")
            second = {"resnets": 0, "attentions": 1, "upsamplers": 1 + has_attention}[part]
            yield f"output_blocks.{place}.{second}.{rest}", tensor


def _autoencoder(vae: Any) -> Iterator[tuple[str, torch.Tensor]]:
    blocks = len(vae.config.block_out_channels)
    for name, tensor in vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{blocks - 1 - int(match[1])}", name)
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        name = name.replace(".resnets.", ".block.")
        is_attention = "attentions" in name
        for ours, theirs in _OF_AUTOENCODER.items():
            name = re.sub(rf"(?<=\.){re.escape(ours)}(?=\.)", theirs, name)
        yield name, tensor[:, :, None, None] if is_attention and tensor.ndim == 2 else tensor


def _second_text_encoder(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights.items():
        inner = name.removeprefix("text_model.")
        if inner in _OF_TEXTS:
            yield _OF_TEXTS[inner], tensor
        elif inner == "text_projection.weight":
            yield "text_projection", tensor.T
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", inner):
            own = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            yield f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}", torch.cat(own)
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", inner):
            if match[2] in _OF_TEXT_LAYERS:
                yield f"transformer.resblocks.{match[1]}.{_OF_TEXT_LAYERS[match[2]]}.{match[3]}", tensor
