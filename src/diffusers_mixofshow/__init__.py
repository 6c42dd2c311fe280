"""Several of your own concepts in one picture: ED-LoRA, gradient fusion, regionally controllable sampling.

The method is Mix-of-Show (arXiv:2305.18292). Public names are imported on first use, so that importing the package
itself is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from diffusers_mixofshow.client import tune_concept
    from diffusers_mixofshow.concepts import Concept
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.errors import MixOfShowError, MixOfShowWarning
    from diffusers_mixofshow.fusion.config import FusionConfig
    from diffusers_mixofshow.fusion.fuser import GradientFuser
    from diffusers_mixofshow.fusion.pack import FusedPack
    from diffusers_mixofshow.fusion.sources import FusionSource, LoRASource
    from diffusers_mixofshow.pipelines.adapter import MixOfShowAdapterPipeline, MixOfShowXLAdapterPipeline
    from diffusers_mixofshow.pipelines.controlnet import MixOfShowControlNetPipeline, MixOfShowXLControlNetPipeline
    from diffusers_mixofshow.pipelines.image_to_image import MixOfShowImg2ImgPipeline, MixOfShowXLImg2ImgPipeline
    from diffusers_mixofshow.pipelines.inpainting import MixOfShowInpaintPipeline, MixOfShowXLInpaintPipeline
    from diffusers_mixofshow.pipelines.loader import EDLoRALoader
    from diffusers_mixofshow.pipelines.refining import refine_regions
    from diffusers_mixofshow.pipelines.stable_diffusion import MixOfShowPipeline
    from diffusers_mixofshow.pipelines.stable_diffusion_xl import MixOfShowXLPipeline
    from diffusers_mixofshow.regions import Draft, Isolation, Layout, Refinement, Region
    from diffusers_mixofshow.training.config import TrainingConfig
    from diffusers_mixofshow.training.masking import make_masks
    from diffusers_mixofshow.training.trainer import EDLoRATrainer


__version__ = "0.1.0"

__all__ = [
    "Concept",
    "Draft",
    "EDLoRA",
    "EDLoRALoader",
    "EDLoRATrainer",
    "FusedPack",
    "FusionConfig",
    "FusionSource",
    "GradientFuser",
    "Isolation",
    "Layout",
    "LoRASource",
    "MixOfShowAdapterPipeline",
    "MixOfShowControlNetPipeline",
    "MixOfShowError",
    "MixOfShowImg2ImgPipeline",
    "MixOfShowInpaintPipeline",
    "MixOfShowPipeline",
    "MixOfShowWarning",
    "MixOfShowXLAdapterPipeline",
    "MixOfShowXLControlNetPipeline",
    "MixOfShowXLImg2ImgPipeline",
    "MixOfShowXLInpaintPipeline",
    "MixOfShowXLPipeline",
    "Refinement",
    "Region",
    "TrainingConfig",
    "make_masks",
    "refine_regions",
    "tune_concept",
]

_HOME = {
    "Concept": "concepts",
    "Draft": "regions",
    "EDLoRA": "edlora",
    "EDLoRALoader": "pipelines.loader",
    "EDLoRATrainer": "training.trainer",
    "FusedPack": "fusion.pack",
    "FusionConfig": "fusion.config",
    "FusionSource": "fusion.sources",
    "GradientFuser": "fusion.fuser",
    "Isolation": "regions",
    "Layout": "regions",
    "MixOfShowAdapterPipeline": "pipelines.adapter",
    "MixOfShowControlNetPipeline": "pipelines.controlnet",
    "LoRASource": "fusion.sources",
    "MixOfShowError": "errors",
    "MixOfShowImg2ImgPipeline": "pipelines.image_to_image",
    "MixOfShowInpaintPipeline": "pipelines.inpainting",
    "MixOfShowPipeline": "pipelines.stable_diffusion",
    "MixOfShowWarning": "errors",
    "MixOfShowXLAdapterPipeline": "pipelines.adapter",
    "MixOfShowXLControlNetPipeline": "pipelines.controlnet",
    "MixOfShowXLImg2ImgPipeline": "pipelines.image_to_image",
    "MixOfShowXLInpaintPipeline": "pipelines.inpainting",
    "MixOfShowXLPipeline": "pipelines.stable_diffusion_xl",
    "Refinement": "regions",
    "Region": "regions",
    "TrainingConfig": "training.config",
    "make_masks": "training.masking",
    "refine_regions": "pipelines.refining",
    "tune_concept": "client",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
