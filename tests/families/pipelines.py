"""Tiny pipelines of every family, of the true classes with random weights, made offline in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import tiny
from diffusers_mixofshow.families import Family
from diffusers_mixofshow.families.layers import linear_layers


_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _clip(words: CLIPTokenizer, width: int, projection: int | None = None) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=projection or width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _t5_words() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    return T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def _t5(words: T5TokenizerFast, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()


def _qwen_words() -> Qwen2Tokenizer:
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    words = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], model_max_length=2048)
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    words.chat_template = _CHAT
    return words


_QWEN = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_SEEING = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
}


def _qwen3(words: Qwen2Tokenizer, kind: type, layers: int) -> Any:
    size = _QWEN | {"vocab_size": len(words), "head_dim": 8, "max_position_embeddings": 2048}
    return kind(Qwen3Config(**size, num_hidden_layers=layers)).eval()


def _vae(kind: type = AutoencoderKL, **settings: Any) -> Any:
    return kind(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **settings,
    ).eval()


def _qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def _stable_diffusion() -> Any:
    return diffusers.StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)


def _sdxl() -> Any:
    words, words_2 = tiny.tokenizer(), tiny.tokenizer()
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(4, 8),
        use_linear_projection=True,
        cross_attention_dim=32 + 48,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 6 * 8,
        norm_num_groups=8,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(words, 32),
        text_encoder_2=_clip(words_2, 48, projection=40),
        tokenizer=words,
        tokenizer_2=words_2,
        unet=unet.eval(),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def _flux1() -> Any:
    words, words_2 = tiny.tokenizer(), _t5_words()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(shift_factor=0.1, scaling_factor=0.36),
        text_encoder=_clip(words, 32),
        tokenizer=words,
        text_encoder_2=_t5(words_2, 32),
        tokenizer_2=words_2,
        transformer=transformer.eval(),
    )


def _flux2_klein() -> Any:
    words = _qwen_words()
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return diffusers.Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(diffusers.AutoencoderKLFlux2),
        text_encoder=_qwen3(words, Qwen3ForCausalLM, 28),  # layers 9, 18 and 27 are read
        tokenizer=words,
        transformer=transformer.eval(),
    )


def _sd3() -> Any:
    words, words_2, words_3 = tiny.tokenizer(), tiny.tokenizer(), _t5_words()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=24 + 40,
        pos_embed_max_size=32,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=_clip(words, 24, projection=24),
        tokenizer=words,
        text_encoder_2=_clip(words_2, 40, projection=40),
        tokenizer_2=words_2,
        text_encoder_3=_t5(words_3, 64),
        tokenizer_3=words_3,
    )


def _qwen_image() -> Any:
    words = _qwen_words()
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    texts = _QWEN | {"vocab_size": len(words), "num_hidden_layers": 2, "rope_scaling": rope}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=texts, vision_config=_SEEING))
    return diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_qwen_vae(),
        text_encoder=encoder.eval(),
        tokenizer=words,
        transformer=transformer.eval(),
    )


def _z_image() -> Any:
    words = _qwen_words()
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    for name in ("x_pad_token", "cap_pad_token"):  # not filled by the class
        torch.nn.init.normal_(getattr(transformer, name))
    return diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.1, scaling_factor=0.36),
        text_encoder=_qwen3(words, Qwen3Model, 2),
        tokenizer=words,
        transformer=transformer.eval(),
    )


def _krea2() -> Any:
    words = _qwen_words()
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=24,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    texts = _QWEN | {"vocab_size": len(words), "num_hidden_layers": 2, "head_dim": 8}
    seeing = _SEEING | {"deepstack_visual_indexes": []}
    return diffusers.Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
        ),
        vae=_qwen_vae(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=texts, vision_config=seeing)).eval(),
        tokenizer=words,
        transformer=transformer.eval(),
        text_encoder_select_layers=(0, 1, 2),
    )


def _anima() -> Any:
    """Its transformer alone, in the only pipeline that it has; the width of its text is the true one."""
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=1024,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    pipe = diffusers.AnimaAutoBlocks().init_pipeline()
    pipe.update_components(transformer=transformer.eval())
    return pipe


_MADE: Mapping[str, Callable[[], Any]] = {
    "Stable Diffusion": _stable_diffusion,
    "Stable Diffusion XL": _sdxl,
    "FLUX.1": _flux1,
    "FLUX.2 klein": _flux2_klein,
    "Stable Diffusion 3": _sd3,
    "Qwen-Image": _qwen_image,
    "Z-Image": _z_image,
    "Krea 2": _krea2,
    "Anima": _anima,
}


def is_here(family: Family) -> bool:
    """Whether the installed diffusers, which may be older than a family, has its pipeline."""
    return hasattr(diffusers, family.pipeline or "AnimaAutoBlocks")


def tiny_pipeline(family: str) -> Any:
    """A tiny pipeline of a family, by its name, with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = _MADE[family]()
    if hasattr(made, "set_progress_bar_config"):
        made.set_progress_bar_config(disable=True)
    return made


@contextmanager
def features_of(pipe: Any, sites: Iterable[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What layers read inside the block, as rows of float64, whatever is wrapped around them."""
    found: dict[str, list[torch.Tensor]] = {site: [] for site in sites}
    layers = linear_layers(pipe.components)

    def note(site: str) -> Any:
        return lambda module, inputs: found[site].append(inputs[0].double().flatten(end_dim=-2))

    hooks = [layers[site].register_forward_pre_hook(note(site)) for site in found]
    yield found
    for hook in hooks:
        hook.remove()
