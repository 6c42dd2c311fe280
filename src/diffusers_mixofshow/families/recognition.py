"""Which family, and which of its base models, somebody's model or file belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
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


if TYPE_CHECKING:  # torch takes seconds, and names need none of it
    from torch import nn

Model = TypeVar("Model")

_READS_STREAM = re.compile(r"transformer\..*\.(attn\.(to_[qkv]|add_[qkv]_proj)|attn2\.to_q)")
"""Layers whose input is as wide as the stream of a transformer."""
_READS_TEXT = re.compile(r".*\.attn2\.to_[kv]")
"""Layers whose input is as wide as the text, where there is cross-attention."""

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
"""Every family that the package knows; where several fit equally well, the first is meant."""

CONCEPT_FAMILIES = tuple(family for family in FAMILIES if family.concept_pipeline)
"""Those with which concepts are tuned and drawn, in regions too."""

COMPONENTS = tuple(sorted({component for family in FAMILIES for component in family.components}))
"""Names of every component that has sites, in any family."""

EMBEDDING_PARTS = tuple(
    dict.fromkeys(part for family in FAMILIES if family.cross_attention for part in family.embedding_parts)
)
"""What concepts' tokens have embeddings for, in any family that has layer-wise ones."""

BASE_MODELS: tuple[BaseModel, ...] = tuple(model for family in FAMILIES for model in family.models)


def uncompiled(model: Model) -> Model:
    """The model itself, where `torch.compile` has wrapped it; anything else is itself."""
    inner: Model = getattr(model, "_orig_mod", model)
    return inner


def is_of(denoiser: object, family: Family) -> bool:
    """Whether a model is of the class of a family's denoiser."""
    return family.denoiser_class in {kind.__name__ for kind in type(uncompiled(denoiser)).__mro__}


def family_of(components: Mapping[str, object]) -> Family:
    """The family that a pipeline's components belong to: by the denoiser's class and marks, then by the text encoders.

    Args:
        components: ``pipeline.components``, or a part of them.
    """

    def fit(family: Family) -> tuple[bool, bool, int]:
        encoders = sum(components.get(encoder) is not None for encoder in family.text_encoders)
        denoiser = components.get(family.denoiser)
        return is_of(denoiser, family), _is_marked(denoiser, family), encoders

    return max(FAMILIES, key=fit)


def _is_marked(denoiser: object, family: Family) -> bool:
    """Whether a model has the marks of a family; where that has none, nothing can tell it."""
    config = getattr(uncompiled(denoiser), "config", {})
    return bool(family.marks) and all(config.get(name) == value for name, value in family.marks.items())


def family_of_index(index: Mapping[str, Any]) -> Family:
    """The family of a pipeline that is not loaded yet.

    Args:
        index: What stands in its ``model_index.json``: each component's library and class, which may be null.
    """

    def class_of(component: str) -> object:
        entry = index.get(component)
        return entry[1] if isinstance(entry, list | tuple) and len(entry) == 2 else None

    def fit(family: Family) -> tuple[bool, int]:
        encoders = sum(class_of(encoder) is not None for encoder in family.text_encoders)
        return class_of(family.denoiser) == family.denoiser_class, encoders

    return max(FAMILIES, key=fit)


def family_of_denoiser(model: nn.Module) -> Family:
    """The family that a denoiser, or a ControlNet beside one, belongs to."""
    return next((family for family in FAMILIES if is_of(model, family)), STABLE_DIFFUSION)


def family_of_sites(sites: Iterable[str]) -> Family:
    """The family that has these sites, or most of them."""
    named = tuple(sites)
    return max(FAMILIES, key=lambda family: sum(map(family.has_site, named)))


def families_with(sites: Iterable[str]) -> tuple[Family, ...]:
    """Every family that has all of these sites; families of transformers share many names."""
    named = tuple(sites)
    return tuple(family for family in FAMILIES if named and all(map(family.has_site, named)))


def is_linear_site(site: str) -> bool:
    """Whether a site has the name of a layer that a LoRA of some family may adapt."""
    return any(family.has_site(site) for family in FAMILIES)


def transformers_with(widths: Mapping[str, int], base_model: str = "") -> tuple[Family, ...]:
    """The families of transformers that have all of these sites, as few as widths or the base model tell.

    Args:
        widths: Site name to the width of the layer's input; without a site of a transformer no family is meant.
        base_model: A base model's id, or nothing.
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


def is_original_alone(site: str) -> bool:
    """Whether a layer has a name of the original code of some family, and none of diffusers'."""
    component, _, path = site.partition(".")
    called = any(family.denoiser == component and family.original_layer(path) for family in FAMILIES)
    return called and not is_linear_site(site)


def recognise(widths: Mapping[str, int], vectors: Iterable[Mapping[str, int]] = ()) -> BaseModel | None:
    """The base models that a LoRA's layers and embeddings' widths belong to, or None.

    Args:
        widths: Site name to the width of the layer's input.
        vectors: For every embedding, text encoder to width.
    """
    if any(site.startswith("transformer.") for site in widths):
        found = transformers_with(widths)
        return found[0].models[0] if len(found) == 1 else None
    reading = {width for site, width in widths.items() if _READS_TEXT.fullmatch(site)}
    for model in BASE_MODELS:
        # Any small model may be as wide as the embedded one; it has its own layers.
        if reading == {model.text_width} and not (model is EMBEDDED and foreign_layers(widths, EMBEDDED)):
            return model
    if reading:
        return None
    if any(site.startswith("text_encoder_2.") for site in widths) or any(CLIP_G in each for each in vectors):
        return SDXL
    named = set(_find_cross_attention(widths))
    if named:
        return next((one for one in (SD1, SDXL) if named <= set(one.layers)), None)
    encoder = {width for site, width in widths.items() if site.endswith("self_attn.q_proj")}
    told = encoder | {width for each in vectors for width in each.values()}
    return next((one for one in (SD1, SD2, EMBEDDED) if told == set(one.embeddings.values())), None)


def family_of_updates(widths: Mapping[str, int]) -> Family:
    """The family that a LoRA belongs to: by its widths where they tell, as one U-Net's names are another's.

    Args:
        widths: Site name to the width of the layer's input.
    """
    model = recognise(widths)
    return family_of_sites(widths) if model is None else next(one for one in FAMILIES if model in one.models)


def layers_of(widths: Mapping[str, int], width: int | None, count: int | None = None) -> tuple[str, ...]:
    """Cross-attention layers of the U-Net that a file was made for; empty if nothing in it tells.

    Args:
        widths: Site name to the width of the layer's input.
        width: Width of the embeddings.
        count: Number of layers, where it is known.
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
    """The cross-attention layers of the U-Net's transformer blocks that have one of these sites."""
    for site in sites:
        if match := re.fullmatch(r"unet\.(.+)\.attn[12]\..+", site):
            yield f"{match[1]}.attn2"


def _by_block_and_number(path: str) -> tuple[int, ...]:
    """Order down, mid, up, and by numbers within."""
    return (BLOCKS.index(path.partition(".")[0]), *(int(number) for number in re.findall(r"\.(\d+)", path)))
