"""A tiny Stable Diffusion with random weights and the true class structure, made offline in a fraction of a second."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, T2IAdapter, UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from diffusers_mixofshow.families.layers import cross_attention_layers


_HIDDEN = 32


def tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer whose vocabulary is single bytes, with and without the end-of-word mark."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*symbols, *(s + "</w>" for s in symbols)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def components(*, seed: int = 0) -> dict[str, object]:
    """Components for StableDiffusionPipeline: 4 cross-attention layers, 2 text layers, latents of half the size."""
    torch.manual_seed(seed)
    words = tokenizer()
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_HIDDEN,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
    )
    text_encoder = CLIPTextModel(CLIPTextConfig(**_text_tower(words, layers=2)))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return {
        "unet": unet.eval(),
        "scheduler": scheduler,
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": words,
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
    }


def _text_tower(words: CLIPTokenizer, *, layers: int) -> dict[str, int]:
    """Configuration of a text tower for these words."""
    return {
        "vocab_size": len(words),
        "hidden_size": _HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def clip(*, seed: int = 0) -> CLIPModel:
    """Both towers of a CLIP for the tiny tokenizer: pictures of 64 pixels and texts as vectors of 96 numbers."""
    torch.manual_seed(seed)
    vision = {"hidden_size": _HIDDEN, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return CLIPModel(
        CLIPConfig(
            text_config=_text_tower(tokenizer(), layers=1),
            vision_config=vision | {"image_size": 64, "patch_size": 8},
            projection_dim=96,
        )
    ).eval()


def clipseg(*, seed: int = 0) -> CLIPSegForImageSegmentation:
    """A CLIPSeg for the tiny tokenizer, in patches of 8 pixels; likelihoods are from near 0 to near 1."""
    torch.manual_seed(seed)
    vision = {"hidden_size": _HIDDEN, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = CLIPSegForImageSegmentation(
        CLIPSegConfig(
            text_config=_text_tower(tokenizer(), layers=1),
            vision_config=vision | {"image_size": 64, "patch_size": 8},
            projection_dim=16,
            reduce_dim=16,
            extract_layers=[0],
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
            use_complex_transposed_convolution=True,
        )
    )
    model.eval()
    last = model.decoder.transposed_convolution[-1]
    with torch.no_grad():  # versions draw other weights; of a picture of noise one half shall be likely
        last.bias.zero_()
        ids = torch.tensor([[tokenizer().bos_token_id, 1, tokenizer().eos_token_id]])
        logits = model(pixel_values=torch.randn(1, 3, 176, 176), input_ids=ids).logits
        last.weight *= 4 / logits.std()
        last.bias -= 4 * logits.median() / logits.std()
    return model


def controlnet(unet: UNet2DConditionModel, *, seed: int = 0) -> ControlNetModel:
    """A ControlNet for the tiny U-Net, its zero convolutions random so that it has an effect."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    for layer in [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]:
        torch.nn.init.normal_(layer.weight, std=0.3)
    return net.eval()


def adapter(*, seed: int = 0, in_channels: int = 3) -> T2IAdapter:
    """A T2I-Adapter for the tiny U-Net: one feature map, for the first block."""
    torch.manual_seed(seed)
    return T2IAdapter(
        in_channels=in_channels,
        channels=[32],
        num_res_blocks=1,
        downscale_factor=4,
        adapter_type="full_adapter",
    ).eval()


def add_ip_adapter(unet: UNet2DConditionModel) -> None:
    """Add a random IP-Adapter of four tokens, for image embeddings of 8 values."""
    width = unet.config.cross_attention_dim
    torch.manual_seed(0)
    for path in cross_attention_layers(unet):
        layer = unet.get_submodule(path)
        layer.set_processor(IPAdapterAttnProcessor2_0(layer.inner_dim, width, num_tokens=(4,), scale=1.0))
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=width, num_image_text_embeds=4)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
