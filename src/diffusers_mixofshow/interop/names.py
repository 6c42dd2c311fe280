"""Translate the layer names of other programs' LoRA files to and from site names (see `families.family`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

from diffusers_mixofshow.edlora.defects import sanitise
from diffusers_mixofshow.errors import EDLoRAFormatError
from diffusers_mixofshow.families import FAMILIES, Family
from diffusers_mixofshow.families.layers import canonical_name
from diffusers_mixofshow.families.original_code import insert_block_number
from diffusers_mixofshow.families.recognition import is_linear_site, is_only_original


class Spelling(StrEnum):
    """Naming scheme of a LoRA's tensors; the value is its display name."""

    KOHYA = "kohya / A1111 / ComfyUI"
    ONE_TRAINER = "OneTrainer"
    LYCORIS = "LyCORIS"
    COMFYUI = "ComfyUI, saved by its own nodes"
    AI_TOOLKIT = "ai-toolkit / ComfyUI"
    ORIGINAL = "the original code's names"
    PEFT = "PEFT"
    DIFFUSERS = "diffusers"
    ONE_MODEL = "diffusers, one model's adapter"
    DIFFUSERS_OLD = "diffusers, old names"


_HALF = re.compile(
    r"(?P<layer>.+?)(\.(?P<peft>lora_A|lora_B)(\.(?P<adapter>[^.]+))?|"
    r"([._](lora_|lora\.|lora_linear_layer\.)|(?<=_lora[12])\.)(?P<half>down|up))\.weight"
)
_FLAT = re.compile(r"(lora_(?P<component>unet|transformer|te|te1|te2)|lycoris)_(?P<path>.+)")
_FLAT_COMPONENTS = {
    "unet": "unet",
    "transformer": "transformer",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
}
_FLAT_PATHS = {
    path.replace(".", "_"): path
    for family in FAMILIES
    for name, layer in family.original.items()
    for path in (name, *layer.paths)
}
"""Transformer path with underscores for dots and N for the block's number, to the path (original and diffusers)."""
_FLAT_NUMBER = re.compile(r"(?<=_)\d+(?=_)")
"""Number of a block; the first match counts."""
_FLAT_SPELLINGS = {None: Spelling.LYCORIS, "transformer": Spelling.ONE_TRAINER}
_NUMBERS = {"text_encoder": "1", "text_encoder_2": "2"}
"""Numbers of text encoders in kohya's names, if there are two."""
_COMPONENT = re.compile(r"(unet|transformer|text_encoder_2|text_encoder)\.")
_COMFYUI = {
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
_PEFT = "base_model.model."
# Names that contain underscores: kohya's files use underscores for the dots between names as well.
_WORDS = re.compile(
    r"down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks|transformer_blocks|to_q|to_k|to_v|to_out|"
    r"proj_in|proj_out|text_model|text_projection|self_attn|q_proj|k_proj|v_proj|out_proj|time_emb_proj|conv_shortcut|"
    r"in_layers|out_layers|emb_layers|skip_connection|conv_in|conv_out|time_embedding|time_embed|label_emb|"
    r"add_embedding|linear_1|linear_2|[^_]+"
)
# Old diffusers named the text encoder's projections like the U-Net's.
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}
_LDM_STAGES = ("input_blocks", "middle_block", "output_blocks")
_BLOCKS_A_STAGE = 3  # in the original Stable Diffusion code: two or three layers and one that resizes
_LDM_LAYERS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("in_layers", "2"): ("conv1",),
    ("out_layers", "3"): ("conv2",),
    ("emb_layers", "1"): ("time_emb_proj",),
    ("skip_connection",): ("conv_shortcut",),
    ("op",): ("conv",),
}
_NUMBER = re.compile(r"[0-9]{1,3}")
_IN_LDM = re.compile(
    r"unet\.(mid_block\.(attentions\.0|resnets\.[01])|(down|up)_blocks\.[0-9]{1,3}\.(attentions|resnets)\.[0-9]{1,3})\..+"
)
"""Sites that the original Stable Diffusion code has a name for."""
_LDM_MIDDLE = {"0": ("resnets", "0"), "1": ("attentions", "0"), "2": ("resnets", "1")}


def half_of(name: str) -> tuple[str, str] | None:
    """Layer name in the file, and ``down`` or ``up``; None if the tensor is not half of a LoRA."""
    match = _HALF.fullmatch(name)
    if match is None:
        return None
    return match["layer"], match["half"] or {"lora_A": "down", "lora_B": "up"}[match["peft"]]


def adapter_of(name: str) -> str | None:
    """Adapter name within the name of a half: present in a model's state dict, removed (empty) by PEFT when it saves.

    None if the tensor is not half of a LoRA in PEFT's names.
    """
    match = _HALF.fullmatch(name)
    return (match["adapter"] or "") if match and match["peft"] else None


def is_of_peft(name: str) -> bool:
    """Whether a name has the prefix that PEFT puts before a model's names."""
    return _COMPONENT.sub("", name, count=1).startswith(_PEFT)


def spelling_of(name: str) -> Spelling:
    """Naming scheme of a half of a LoRA."""
    if flat := _FLAT.match(name):
        return _FLAT_SPELLINGS.get(flat["component"], Spelling.KOHYA)
    of_peft = ".lora_A." in name or ".lora_B." in name
    if name.startswith(tuple(_COMFYUI)):
        return Spelling.AI_TOOLKIT if of_peft else Spelling.COMFYUI
    if (half := half_of(name)) and is_only_original(site_of(half[0])):
        return Spelling.ORIGINAL
    if is_of_peft(name):
        return Spelling.PEFT
    if not of_peft:
        return Spelling.DIFFUSERS_OLD
    return Spelling.DIFFUSERS if _COMPONENT.match(name) else Spelling.ONE_MODEL


def site_of(layer: str) -> str:
    """Site name of a layer in any naming scheme.

    A layer of a transformer's original code without a counterpart in diffusers keeps its original path: one such layer
    may be several in diffusers, see `interop.original_code`.
    """
    if flat := _FLAT.fullmatch(layer):
        if path := _restore_dots(flat["path"]):
            return f"transformer.{path}"
        told = "te" if "encoder_layers" in flat["path"] else "unet"  # LyCORIS's names contain no component
        component = _FLAT_COMPONENTS[flat["component"] or told]
        return canonical_name(component, _to_diffusers(_WORDS.findall(flat["path"])))
    for prefix, component in _COMFYUI.items():
        if layer.startswith(prefix):
            path = layer.removeprefix(prefix).replace(".processor.", ".")
            return _transformer_site(path) or canonical_name(component, _to_diffusers(path.split(".")))
    named = _COMPONENT.match(layer.removeprefix(_PEFT))
    component = named[1] if named else ("text_encoder" if "encoder.layers" in layer else "unet")
    path = layer.removeprefix(_PEFT).removeprefix(f"{component}.").removeprefix(_PEFT).replace(".processor.", ".")
    if named is None and (site := _transformer_site(path)):
        return site
    if path.endswith(".to_out") and component != "transformer":
        path += ".0"
    if component != "unet":
        path = re.sub(r"(?<=\.self_attn\.)(to_q|to_k|to_v|to_out\.0)$", lambda old: _OLD_TEXT_NAMES[old[0]], path)
    return canonical_name(component, path)


def _transformer_site(path: str) -> str:
    """Site of a path that exists in a known transformer; empty for any other path."""
    site = f"transformer.{path}"
    return site if is_linear_site(site) or is_only_original(site) else ""


def _restore_dots(flat: str) -> str:
    """Path in a known transformer, its dots restored from underscores; empty for any other path."""
    number = _FLAT_NUMBER.search(flat)
    path = _FLAT_PATHS.get(_FLAT_NUMBER.sub("N", flat, count=1), "")
    return insert_block_number(path, number[0]) if number else path


def shared_name(family: Family, layer: str) -> str:
    """Name under which ComfyUI and diffusers both load a layer of a transformer or of its text encoders.

    Args:
        family: The transformer's family, see `Family.shared_names`.
        layer: Site name, or component and path in the original code.
    """
    component, _, path = layer.partition(".")
    prefix = family.shared_names.partition("{")[0]
    if component != family.denoiser:
        return layer if prefix.endswith(".") else kohya_name(layer, several_text_encoders=True, ldm=False)
    return prefix + (path if prefix.endswith(".") else path.replace(".", "_"))


def kohya_name(site: str, *, several_text_encoders: bool, ldm: bool) -> str:
    """Name of a site in kohya's scheme, which A1111 and ComfyUI use as well.

    Args:
        site: The layer, see `families.family`.
        several_text_encoders: Whether the model has two, as SDXL, which are numbered.
        ldm: Name the U-Net's blocks as in the original code, as kohya does for SDXL only.

    Raises:
        EDLoRAFormatError: If the original code has no such block.
    """
    component, _, path = site.partition(".")
    if component == "unet" and ldm and not _IN_LDM.fullmatch(site):
        raise EDLoRAFormatError(
            f"The layer {sanitise(site)} has no name in kohya's files, as SDXL's U-Net has no such block. Convert "
            "it to 'diffusers', or leave the layer out."
        )
    if component == "unet":
        return "lora_unet_" + "_".join(_to_ldm(path.split(".")) if ldm else path.split("."))
    number = _NUMBERS[component] if several_text_encoders else ""
    return f"lora_te{number}_{path.replace('.', '_')}"


def _to_diffusers(words: Sequence[str]) -> str:
    """Module path in diffusers; names of the original Stable Diffusion code are translated."""
    if len(words) < 3 or words[0] not in _LDM_STAGES or not _NUMBER.fullmatch(words[1]):
        return ".".join(words)
    stage, number, *rest = words
    if stage == "middle_block":
        return ".".join(("mid_block", *_LDM_MIDDLE.get(number, (number,)), *_layer_to_diffusers(rest)))
    block, layer = divmod(int(number) - (stage == "input_blocks"), _BLOCKS_A_STAGE)
    inner, *rest = rest
    side, sizer = ("down_blocks", "downsamplers") if stage == "input_blocks" else ("up_blocks", "upsamplers")
    if rest in (["op"], ["conv"]):
        return ".".join((side, str(block), sizer, "0", "conv"))
    kind = {"0": "resnets", "1": "attentions"}.get(inner, inner)
    return ".".join((side, str(block), kind, str(layer), *_layer_to_diffusers(rest)))


def _layer_to_diffusers(words: Sequence[str]) -> Sequence[str]:
    return _LDM_LAYERS.get(tuple(words), tuple(words))


def _to_ldm(words: Sequence[str]) -> Sequence[str]:
    """Names in the original Stable Diffusion code for a module path of diffusers; the reverse of `_to_diffusers`."""
    back = {new: old for old, new in _LDM_LAYERS.items()}
    stage, *rest = words
    if stage == "mid_block":
        numbers = {place: number for number, place in _LDM_MIDDLE.items()}
        return ("middle_block", numbers[rest[0], rest[1]], *back.get(tuple(rest[2:]), tuple(rest[2:])))
    block, kind, layer, *rest = rest
    inner = {"resnets": "0", "attentions": "1"}[kind]
    number = _BLOCKS_A_STAGE * int(block) + int(layer) + (stage == "down_blocks")
    side = "input_blocks" if stage == "down_blocks" else "output_blocks"
    return (side, str(number), inner, *back.get(tuple(rest), tuple(rest)))
