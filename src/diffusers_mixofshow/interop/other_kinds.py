"""What a tensor's name tells of a file that is no LoRA, or none for a supported base: tables of names."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from typing import NamedTuple

from diffusers_mixofshow.interop.lycoris import HIGHEST_RANK


class OtherKind(NamedTuple):
    """A tensor that is no half of a LoRA.

    Args:
        told: What it is, and why it cannot be used.
        layer: The layer it belongs to, as its name spells it.
    """

    told: str
    layer: str


_NO_UPDATE = "which are no low-rank update"
_NOT_LOW = (
    f"which is one of low rank only where the ranks of both multiply to {HIGHEST_RANK} at most and to less than the "
    "layer's size, and is read of LyCORIS's own files of linear layers then (of 8 GB in all at most)"
)
_T5 = r"(lora_te\d_)?encoder[._]block[._]\d+[._]layer[._]"
_CONDITIONER = r"(lora_unet_)?llm_adapter[._]|text_conditioner\."
_KINDS = {
    # Of layers that also have halves of a LoRA, or would otherwise be taken for one.
    r"dora_scale|lora_magnitude_vector": "DoRA, whose effect is no low-rank update",
    r"hada_[wt]\d": f"LoHa (LyCORIS, PEFT), a product of two updates, {_NOT_LOW}",
    r"lokr_[wt]\d": f"LoKr (LyCORIS, PEFT), a Kronecker product, {_NOT_LOW}",
    r"lora_mid\.": "Tucker layers (LyCORIS), which are no low-rank update of a linear layer",
    r"oft_(blocks|R|diag)|boft_[Rs]|rescale$": "OFT or BOFT, rotations of the weights, " + _NO_UPDATE,
    r"on_input$|ia3_l": "(IA)^3, factors on features, " + _NO_UPDATE,
    r"([ab][12]|bm)\.weight$|glora_[A-E]\.": "GLoRA, which depends on the weights and is no low-rank update of them",
    r"[qp]_layer\.weight$|lambda_layer$": "T-LoRA, whose rank depends on the time step",
    r"[wb]_norm$|ln_tuning_layers\.": "trained norms (LyCORIS, LN tuning of PEFT), " + _NO_UPDATE,
    r"diff$": "full differences (LyCORIS, ComfyUI), which are no low-rank update of a linear layer",
    r"diff_b$": "full differences of biases (LyCORIS, ComfyUI), " + _NO_UPDATE,
    r"set_weight$|reshape_weight$": "full differences (ComfyUI), whole weights or shapes, " + _NO_UPDATE,
    r"lora_E(\.|$)|ranknum": "AdaLoRA of PEFT, whose singular values stand between the halves",
    r"lora_diag": "KaSA of PEFT, which changes the base",
    r"lora_embedding_[AB]": "LoRA of an embedding layer (PEFT), which is no linear layer",
    r"scalar$": "a trained scalar (LyCORIS) on the update, which is not read",
    r"base_layer\.|modules_to_save|original_module": "whole weights of the base, as in a dump of PEFT's model",
    # Files that are something else altogether.
    r"\w+_custom_diffusion": "weights of Custom Diffusion, no low-rank update",
    r"\w*(motion_modules|temporal_transformer)": "motion layers of AnimateDiff",
    r"to_[kv]_ip\.|image_proj\.": "an IP-Adapter, which load_ip_adapter reads",
    r"lllite_": "ControlNet-LLLite",
    r"controlnet_|control_model\.|lora_controlnet|input_hint_block": "a ControlNet",
    _T5: "updates of T5, a text encoder of Stable Diffusion 3 and FLUX, which nothing in diffusers loads",
    _CONDITIONER: "updates of Anima's text conditioner, which are not supported",
    r"t5(_?xxl)?$": "embeddings for T5, a text encoder of Stable Diffusion 3 and FLUX",
    r"bias$": "biases, " + _NO_UPDATE,
}

# A name that has one of these is of a U-Net like Stable Diffusion's, whatever else it has.
_STAGES = re.compile(r"^(?!lora_prior_).*(down|up|mid|input|output|middle)_blocks?[._]")
# Of a text model, which tells nothing of the base beside it.
_TEXT = re.compile(rf"(?<![^.])({_T5}|{_CONDITIONER})")
_BLOCKS = r"(?:^|\.|lora_unet_|lora_transformer_|lycoris_)blocks[._]\d+[._]"
# Made for a base that is no family here, or in names that none has; the first that any name of a file has, special
# ones before general ones.
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
    """What a tensor is that is no half of a LoRA, whatever else it resembles; None where its name tells nothing."""
    return _found(name, _known())


def other_method(name: str) -> OtherKind | None:
    """Of which other method of the installed PEFT a tensor is that has no known meaning; None where none is."""
    return _found(name, _methods())


def other_base(names: Collection[str]) -> tuple[str, list[str]]:
    """The base of another kind than Stable Diffusion that a file was made for, and the names that are not of Stable
    Diffusion's; nothing of either where none of them tells.
    """
    strange = [name for name in names if not _STAGES.search(name) and not _TEXT.search(name)]
    for pattern, base in _BASES.items():
        if any(re.search(pattern, name) for name in strange):
            return base, strange
    return "", []


def _found(name: str, patterns: list[tuple[re.Pattern[str], str]]) -> OtherKind | None:
    for pattern, told in patterns:
        if match := pattern.search(name):
            return OtherKind(told, name[: match.start()].rstrip("._"))
    return None


@cache
def _known() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(rf"(?<![^.])({pattern})"), told) for pattern, told in _KINDS.items()]


@cache
def _methods() -> list[tuple[re.Pattern[str], str]]:
    """How the names of every method begin, its shared matrices included; those of LoRA have a meaning."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING  # takes seconds, and most files need none of it

    others = {kind: prefix for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix != "lora_"}
    return [
        (re.compile(rf"(?<![^.]){prefix.removesuffix('lambda_')}"), f"{kind.value} of PEFT, which is no LoRA")
        for kind, prefix in others.items()
    ]
