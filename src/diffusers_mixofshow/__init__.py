"""Several of your own concepts in one picture: ED-LoRA, gradient fusion, regionally controllable sampling.

The method is Mix-of-Show (arXiv:2305.18292). Public names are imported on first use, so that importing the package
itself is instant.
"""

from typing import TYPE_CHECKING

from diffusers_mixofshow.lazy import import_lazily


if TYPE_CHECKING:
    from diffusers_mixofshow import errors, interop, toyland
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
    "errors",
    "interop",
    "make_masks",
    "refine_regions",
    "toyland",
]

_MODULES: dict[str, tuple[str, ...]] = {
    "concepts": ("Concept",),
    "edlora": ("EDLoRA",),
    "errors": ("MixOfShowError", "MixOfShowWarning"),
    "fusion.config": ("FusionConfig",),
    "fusion.fuser": ("GradientFuser",),
    "fusion.pack": ("FusedPack",),
    "fusion.sources": ("FusionSource", "LoRASource"),
    "interop": (),
    "pipelines.adapter": ("MixOfShowAdapterPipeline", "MixOfShowXLAdapterPipeline"),
    "pipelines.controlnet": ("MixOfShowControlNetPipeline", "MixOfShowXLControlNetPipeline"),
    "pipelines.image_to_image": ("MixOfShowImg2ImgPipeline", "MixOfShowXLImg2ImgPipeline"),
    "pipelines.inpainting": ("MixOfShowInpaintPipeline", "MixOfShowXLInpaintPipeline"),
    "pipelines.loader": ("EDLoRALoader",),
    "pipelines.refining": ("refine_regions",),
    "pipelines.stable_diffusion": ("MixOfShowPipeline",),
    "pipelines.stable_diffusion_xl": ("MixOfShowXLPipeline",),
    "regions": ("Draft", "Isolation", "Layout", "Refinement", "Region"),
    "toyland": (),
    "training.config": ("TrainingConfig",),
    "training.masking": ("make_masks",),
    "training.trainer": ("EDLoRATrainer",),
}

__getattr__ = import_lazily(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
