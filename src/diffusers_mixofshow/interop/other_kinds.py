"""Recognise, by tensor names, files of other methods than LoRA and LoRAs of unsupported bases."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from typing import NamedTuple

from diffusers_mixofshow.interop.lycoris import HIGHEST_RANK


class OtherKind(NamedTuple):
    """A tensor of another method than LoRA.

    Args:
        told: What it is, and why it cannot be used.
        layer: The layer it belongs to, as the file spells it.
    """

    told: str
    layer: str


_NO_UPDATE = "which are not a low-rank update"
_NOT_LOW = (
    f"which is read only from LyCORIS's own files of linear layers, and only if the product of both ranks is at most "
    f"{HIGHEST_RANK} and below the layer's size, and the result at most 8 GB"
)
_T5 = r"(lora_te\d_)?encoder[._]block[._]\d+[._]layer[._]"
_CONDITIONER = r"(lora_unet_)?llm_adapter[._]|text_conditioner\."
_KINDS = {
    # Methods whose layers also have halves of a LoRA, or would otherwise be taken for one.
    r"dora_scale|lora_magnitude_vector": "DoRA, whose effect is not a low-rank update",
    r"hada_[wt]\d": f"LoHa (LyCORIS, PEFT), a product of two updates, {_NOT_LOW}",
    r"lokr_[wt]\d": f"LoKr (LyCORIS, PEFT), a Kronecker product, {_NOT_LOW}",
    r"lora_mid\.": "Tucker layers (LyCORIS), which are not a low-rank update of a linear layer",
    r"oft_(blocks|R|diag)|boft_[Rs]|rescale$": "OFT or BOFT, rotations of the weights, " + _NO_UPDATE,
    r"on_input$|ia3_l": "(IA)^3, factors on features, " + _NO_UPDATE,
    r"([ab][12]|bm)\.weight$|glora_[A-E]\.": "GLoRA, which depends on the weights and is not a low-rank update",
    r"[qp]_layer\.weight$|lambda_layer$": "T-LoRA, whose rank depends on the time step",
    r"[wb]_norm$|ln_tuning_layers\.": "trained norms (LyCORIS, LN tuning of PEFT), " + _NO_UPDATE,
    r"diff$": "full differences (LyCORIS, ComfyUI), which are not a low-rank update of a linear layer",
    r"diff_b$": "full differences of biases (LyCORIS, ComfyUI), " + _NO_UPDATE,
    r"set_weight$|reshape_weight$": "full differences (ComfyUI), full weights or shapes, " + _NO_UPDATE,
    r"lora_E(\.|$)|ranknum": "AdaLoRA of PEFT, whose singular values stand between the halves",
    r"lora_diag": "KaSA of PEFT, which changes the base",
    r"lora_embedding_[AB]": "LoRA of an embedding layer (PEFT), which is not a linear layer",
    r"scalar$": "a trained scalar (LyCORIS) on the update, which is not read",
    r"base_layer\.|modules_to_save|original_module": "full weights of the base, as in the state dict of PEFT's model",
    # Files of entirely different kinds.
    r"\w+_custom_diffusion": "weights of Custom Diffusion, not a low-rank update",
    r"\w*(motion_modules|temporal_transformer)": "motion layers of AnimateDiff",
    r"to_[kv]_ip\.|image_proj\.": "an IP-Adapter, which load_ip_adapter reads",
    r"lllite_": "ControlNet-LLLite",
    r"controlnet_|control_model\.|lora_controlnet|input_hint_block": "a ControlNet",
    _T5: "updates of T5, a text encoder of Stable Diffusion 3 and FLUX, which nothing in diffusers loads",
    _CONDITIONER: "updates of Anima's text conditioner, which are not supported",
    r"t5(_?xxl)?$": "embeddings for T5, a text encoder of Stable Diffusion 3 and FLUX",
    r"bias$": "biases, " + _NO_UPDATE,
}

# A name that matches belongs to a U-Net like Stable Diffusion's.
_STAGES = re.compile(r"^(?!lora_prior_).*(down|up|mid|input|output|middle)_blocks?[._]")
# A name that matches belongs to a text model and says nothing about the base.
_TEXT = re.compile(rf"(?<![^.])({_T5}|{_CONDITIONER})")
_BLOCKS = r"(?:^|\.|lora_unet_|lora_transformer_|lycoris_)blocks[._]\d+[._]"
# Unsupported bases, or supported ones in unknown names. The first pattern that any name of a file matches decides, so
# specific patterns come before general ones.
_BASES = {
    r"distilled_guidance_layer": "Chroma",
    r"to_qkv_mlp_proj|(double|single)_stream_modulation": "FLUX.2",
    r"token_refiner|(img|txt)_mlp[._]fc": "HunyuanVideo or HunyuanImage",
    r"(double|single)_stream_blocks": "HiDream",
    r"joint_transformer_blocks": "AuraFlow",
    r"joint_blocks": "Stable Diffusion 3",
    r"(double|single)_blocks|single_transformer_blocks": "FLUX, or a relative of it such as Chroma or HunyuanVideo",
    r"(img|txt)_(mlp|mod)[._]": "Qwen-Image",
    r"audio_attn|audio_to_video|video_to_audio": "LTX-2",
    r"text_fusion|[._]to_gate": "Krea 2",
    r"(context|noise)_refiner|(?<!encoder[._])layers[._]\d+[._](attention|attn|feed_forward)[._]": "Z-Image or Lumina",
    _BLOCKS + r"(self|cross)_attn[._]([qkv]|output)_proj": "Cosmos or Anima",
    _BLOCKS + r"((self|cross)_attn[._][qkvo](_img)?([._]|$)|attn[12][._]to_|ffn[._])": "Wan",
    r"prior_(unet|te)_": "Stable Cascade",
    r"(?<!encoder[._])layers[._]\d+[._](self_attn|self_attention|mlp)[._]": "a language model, or one like it",
    r"add_[qkv]_proj|to_add_out|ff_context": "a transformer with joint attention, as Stable Diffusion 3, FLUX and "
    "Qwen-Image have it",
    r"^(base_model\.model\.)?(lora_)?transformer[._]|(^|[._])(transformer_)?blocks[._]\d": "a transformer such as "
    "PixArt, Sana, LTX-Video or CogVideoX",
}


def other_kind(name: str) -> OtherKind | None:
    """The other method or kind that a tensor belongs to, by our own table of names; None if unknown."""
    return _match(name, _compile_kinds())


def other_method(name: str) -> OtherKind | None:
    """The other method of the installed PEFT that a tensor belongs to, by PEFT's prefixes; None if unknown."""
    return _match(name, _compile_methods())


def other_base(names: Collection[str]) -> tuple[str, list[str]]:
    """The unsupported base that a file was made for, and the names that do not belong to a Stable Diffusion U-Net.

    Both are empty if no name matches.
    """
    strange = [name for name in names if not _STAGES.search(name) and not _TEXT.search(name)]
    for pattern, base in _BASES.items():
        if any(re.search(pattern, name) for name in strange):
            return base, strange
    return "", []


def _match(name: str, patterns: list[tuple[re.Pattern[str], str]]) -> OtherKind | None:
    for pattern, told in patterns:
        if match := pattern.search(name):
            return OtherKind(told, name[: match.start()].rstrip("._"))
    return None


@cache
def _compile_kinds() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(rf"(?<![^.])({pattern})"), told) for pattern, told in _KINDS.items()]


@cache
def _compile_methods() -> list[tuple[re.Pattern[str], str]]:
    """Name prefixes of all methods of the installed PEFT except LoRA, including their shared matrices."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING  # takes seconds, and most files do not need it

    others = {kind: prefix for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix != "lora_"}
    return [
        (re.compile(rf"(?<![^.]){prefix.removesuffix('lambda_')}"), f"{kind.value} of PEFT, which is not LoRA")
        for kind, prefix in others.items()
    ]
