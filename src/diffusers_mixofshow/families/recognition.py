"""Recognise the family, and the base model within it, of a loaded model or a LoRA file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from diffusers_mixofshow.families.anima import ANIMA
from diffusers_mixofshow.families.clip import CLIP_G, CLIP_L
from diffusers_mixofshow.families.family import BaseModel, Family
from diffusers_mixofshow.families.flux1 import FLUX1
from diffusers_mixofshow.families.flux2_klein import FLUX2_KLEIN
from diffusers_mixofshow.families.krea2 import KREA2
from diffusers_mixofshow.families.qwen_image import QWEN_IMAGE
from diffusers_mixofshow.families.sd3 import STABLE_DIFFUSION_3
from diffusers_mixofshow.families.sdxl import SDXL, STABLE_DIFFUSION_XL
from diffusers_mixofshow.families.stable_diffusion import EMBEDDED, SD1, SD2, STABLE_DIFFUSION
from diffusers_mixofshow.families.unet import BLOCKS
from diffusers_mixofshow.families.z_image import Z_IMAGE


if TYPE_CHECKING:  # importing torch takes seconds and is not needed for names
    from torch import nn

Model = TypeVar("Model")

_READS_STREAM = re.compile(r"transformer\..*\.(attn\.(to_[qkv]|add_[qkv]_proj)|attn2\.to_q)")
"""Layers whose input width is the stream width of a transformer."""
_READS_TEXT = re.compile(r".*\.attn2\.to_[kv]")
"""Cross-attention layers whose input width is the width of the text states."""

_TEXT_ENCODERS = {"CLIPTextModel", "CLIPTextModelWithProjection", None}
"""Classes of the text encoders that families adapt; None where a pipeline has none under this name."""

FAMILIES: tuple[Family, ...] = (
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
    FLUX1,
    FLUX2_KLEIN,
    STABLE_DIFFUSION_3,
    QWEN_IMAGE,
    Z_IMAGE,
    KREA2,
    ANIMA,
)
"""Every known family; if several match equally well, the first counts."""

CONCEPT_FAMILIES = tuple(family for family in FAMILIES if family.concept_pipeline)
"""Families that support concepts (ED-LoRAs) and regions."""

COMPONENTS = tuple(sorted({component for family in FAMILIES for component in family.components}))
"""Names of every component that has sites, in any family."""

EMBEDDING_PARTS = tuple(
    dict.fromkeys(part for family in FAMILIES if family.cross_attention for part in family.embedding_parts)
)
"""Kinds of embeddings (`Family.embedding_parts`) in any family with layer-wise embeddings."""

BASE_MODELS: tuple[BaseModel, ...] = tuple(model for family in FAMILIES for model in family.models)


def unwrap_compiled(model: Model) -> Model:
    """Unwrap a model that `torch.compile` has wrapped; return anything else unchanged."""
    inner: Model = getattr(model, "_orig_mod", model)
    return inner


def is_denoiser_of(denoiser: object, family: Family) -> bool:
    """Whether a model has the class of a family's denoiser."""
    return family.denoiser_class in {kind.__name__ for kind in type(unwrap_compiled(denoiser)).__mro__}


def family_of(components: Mapping[str, object]) -> Family:
    """The family of a pipeline's components, by the denoiser's class and configuration, then by text encoders.

    Args:
        components: ``pipeline.components``, or a part of them.
    """

    def fit(family: Family) -> tuple[bool, bool, int]:
        encoders = sum(components.get(encoder) is not None for encoder in family.text_encoders)
        denoiser = components.get(family.denoiser)
        return is_denoiser_of(denoiser, family), _is_marked(denoiser, family), encoders

    return max(FAMILIES, key=fit)


def _is_marked(denoiser: object, family: Family) -> bool:
    """Whether a model's configuration has the marks of a family; False for a family without marks."""
    config = getattr(unwrap_compiled(denoiser), "config", {})
    return bool(family.marks) and all(config.get(name) == value for name, value in family.marks.items())


def family_of_index(index: Mapping[str, Any]) -> Family | None:
    """The family of a pipeline that is not loaded yet; None if it has no known family's denoiser and text encoder.

    Args:
        index: Content of its ``model_index.json``: library and class of each component, which may be null.
    """

    def class_of(component: str) -> object:
        entry = index.get(component)
        return entry[1] if isinstance(entry, list | tuple) and len(entry) == 2 else None

    def count_encoders(family: Family) -> int:
        return sum(class_of(encoder) is not None for encoder in family.text_encoders)

    def reads_them(family: Family) -> bool:
        kinds = {class_of(encoder) for encoder in index.keys() & family.text_encoders.keys()}
        return kinds <= _TEXT_ENCODERS and bool(kinds or not family.text_encoders)

    fitting = [
        family for family in FAMILIES if class_of(family.denoiser) == family.denoiser_class and reads_them(family)
    ]
    return max(fitting, key=count_encoders, default=None)


def family_of_denoiser(model: nn.Module) -> Family:
    """The family of a denoiser or of a ControlNet; Stable Diffusion if unknown."""
    return next((family for family in FAMILIES if is_denoiser_of(model, family)), STABLE_DIFFUSION)


def family_of_sites(sites: Iterable[str]) -> Family:
    """The family that has most of these sites."""
    named = tuple(sites)
    return max(FAMILIES, key=lambda family: sum(map(family.has_site, named)))


def families_with(sites: Iterable[str]) -> tuple[Family, ...]:
    """Every family that has all of these sites; transformer families share many names."""
    named = tuple(sites)
    return tuple(family for family in FAMILIES if named and all(map(family.has_site, named)))


def is_linear_site(site: str) -> bool:
    """Whether some family has a layer of this name that a LoRA may adapt."""
    return any(family.has_site(site) for family in FAMILIES)


def transformers_with(widths: Mapping[str, int], base_model: str = "") -> tuple[Family, ...]:
    """The transformer families that have all of these sites, narrowed down by base model and widths.

    Args:
        widths: Site name to the width of the layer's input; empty result without a site of a transformer.
        base_model: A base model's id; may be empty.
    """
    denoisers = {site.partition(".")[0] for site in widths}
    found = tuple(family for family in families_with(widths) if family.original and family.denoiser in denoisers)
    streams, texts = ({w for site, w in widths.items() if p.fullmatch(site)} for p in (_READS_STREAM, _READS_TEXT))
    for fits in (
        lambda model: bool(base_model) and base_model in (model.id, *model.other_ids),
        lambda model: bool(streams) and streams <= set(model.stream_widths),
        lambda model: texts == {model.text_width},
    ):
        found = tuple(family for family in found if any(map(fits, family.models))) or found
    return found


def is_only_original(site: str) -> bool:
    """Whether a site is named after a family's original code and not after diffusers."""
    component, _, path = site.partition(".")
    called = any(family.denoiser == component and family.original_layer(path) for family in FAMILIES)
    return called and not is_linear_site(site)


def recognise(widths: Mapping[str, int], vectors: Sequence[Mapping[str, int]] = ()) -> BaseModel | None:
    """Recognise the base model of a LoRA by its layers and widths and by the widths of embeddings; None if unknown.

    Args:
        widths: Site name to the width of the layer's input.
        vectors: For every embedding, text encoder to width.
    """
    if any(site.startswith("transformer.") for site in widths):
        found = transformers_with(widths)
        return _model_of_width(found[0], widths) if len(found) == 1 else None
    reading = {width for site, width in widths.items() if _READS_TEXT.fullmatch(site)}
    for model in BASE_MODELS:
        # Other small models may have an embedded base's text width but have other layers.
        if reading == {model.text_width} and not (model.classes and foreign_layers(widths, model)):
            return model
    if reading:
        return None
    encoders = {site: width for site, width in widths.items() if site.endswith("self_attn.q_proj")}
    if any(site.startswith("text_encoder_2.") for site in widths) or any(CLIP_G in each for each in vectors):
        told = {width for site, width in encoders.items() if site.startswith("text_encoder_2.")}
        told |= {each[CLIP_G] for each in vectors if CLIP_G in each}
        return next((one for one in STABLE_DIFFUSION_XL.models if told == {one.embeddings[CLIP_G]}), SDXL)
    named = set(_find_cross_attention(widths))
    if named:
        return next((one for one in (SD1, SDXL) if named <= set(one.layers)), None)
    told = {*encoders.values(), *(width for each in vectors for width in each.values())}
    return next((one for one in (SD1, SD2, EMBEDDED) if told == set(one.embeddings.values())), None)


def _model_of_width(family: Family, widths: Mapping[str, int]) -> BaseModel:
    """A transformer family's model of these layers' widths; its first one if none has them."""
    streams = {width for site, width in widths.items() if _READS_STREAM.fullmatch(site)}
    return next((one for one in family.models if streams & set(one.stream_widths)), family.models[0])


def family_of_updates(widths: Mapping[str, int]) -> Family:
    """The family of a LoRA, by its widths if they decide; U-Nets of different families share layer names.

    Args:
        widths: Site name to the width of the layer's input.
    """
    model = recognise(widths)
    return family_of_sites(widths) if model is None else next(one for one in FAMILIES if model in one.models)


def family_by_text_width(widths: Mapping[str, int]) -> Family | None:
    """The family of a U-Net's LoRA, by the width of the text states that its layers read; None if it is unknown.

    Args:
        widths: Site name to the width of the layer's input.
    """
    reading = {width for site, width in widths.items() if site.startswith("unet.") and _READS_TEXT.fullmatch(site)}
    families = (family for family in FAMILIES if family.denoiser == "unet")
    return next((one for one in families if any(reading == {model.text_width} for model in one.models)), None)


def is_of_another(widths: Mapping[str, int], family: Family) -> bool:
    """Whether a LoRA changes layers that only another family has.

    Args:
        widths: Site name to the width of the layer's input.
        family: The family of a base model.
    """
    if not all(map(family.has_site, widths)):
        return family_of_updates(widths) is not family
    told = family_by_text_width(widths)  # U-Nets of different families have layers of the same names
    return told is not None and told is not family


def find_family_defect(loras: Mapping[str, Mapping[str, int]], family: Family) -> str:
    """Why LoRAs do not belong to the family of a base model; empty if they may.

    Args:
        loras: Name of each LoRA to site names and widths of the layers' inputs.
        family: The family of the base model.
    """
    strange = {name: widths for name, widths in loras.items() if is_of_another(widths, family)}
    if not strange:
        return ""
    return (
        f"the base model is one of {family.name}, whose layers are others than those of {list_families(strange)}; "
        "give the base that they were tuned on"
    )


def list_families(loras: Mapping[str, Mapping[str, int]]) -> str:
    """The family of each LoRA, in words; for the argument see `find_family_defect`."""
    return ", ".join(f"{name} for {family_of_updates(widths).name}" for name, widths in loras.items())


def layers_of(widths: Mapping[str, int], width: int | None, count: int | None = None) -> tuple[str, ...]:
    """Cross-attention layers of the U-Net that a file was made for; empty if unknown.

    Args:
        widths: Site name to the width of the layer's input.
        width: Width of the embeddings.
        count: Number of layers, if known.
    """
    model = recognise(widths, [{CLIP_L: width}] if width else [])
    if model is not None and count in (None, len(model.layers)):
        return model.layers
    named = sorted(set(_find_cross_attention(widths)), key=_by_block_and_number)
    return tuple(named) if named and count in (None, len(named)) else ()


def foreign_layers(sites: Iterable[str], model: BaseModel) -> list[str]:
    """Sites of attention layers that a base model does not have."""
    return [site for site in sites if any(layer not in model.layers for layer in _find_cross_attention([site]))]


def _find_cross_attention(sites: Iterable[str]) -> Iterator[str]:
    """For each site inside a U-Net's transformer block, that block's cross-attention layer."""
    for site in sites:
        if match := re.fullmatch(r"unet\.(.+)\.attn[12]\..+", site):
            yield f"{match[1]}.attn2"


def _by_block_and_number(path: str) -> tuple[float, ...]:
    """Sort key: down, mid, up, then the numbers in the path."""
    return (BLOCKS.index(path.partition(".")[0]), *(float(number) for number in re.findall(r"\.(\d+)", path)))
