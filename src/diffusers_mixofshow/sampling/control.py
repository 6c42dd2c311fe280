"""Condition images on the command line: made from a picture by a detector, and followed by a ControlNet or adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_mixofshow.base_models import TOYLAND, dtype_argument, location_of
from diffusers_mixofshow.errors import ConfigurationError, HubError, MissingExtraError, first_line
from diffusers_mixofshow.families import Family, family_of
from diffusers_mixofshow.families.sdxl import STABLE_DIFFUSION_XL


if TYPE_CHECKING:
    from PIL import Image

    from diffusers_mixofshow.pipelines import (
        MixOfShowAdapterPipeline,
        MixOfShowControlNetPipeline,
        MixOfShowPipeline,
    )

IMAGE = "image"
"""Takes the place of a detector for a picture that is a condition image already."""

CONTROLNETS = {
    "canny": "lllyasviel/control_v11p_sd15_canny",
    "depth_midas": "lllyasviel/control_v11f1p_sd15_depth",
    "lineart_realistic": "lllyasviel/control_v11p_sd15_lineart",
    "mlsd": "lllyasviel/control_v11p_sd15_mlsd",
    "normal_bae": "lllyasviel/control_v11p_sd15_normalbae",
    "openpose": "lllyasviel/control_v11p_sd15_openpose",
    "scribble_hed": "lllyasviel/control_v11p_sd15_scribble",
    "softedge_hed": "lllyasviel/control_v11p_sd15_softedge",
}
"""Name of a detector in controlnet_aux to the ControlNet for Stable Diffusion 1.5 that was trained with it."""

ADAPTERS = {
    "canny": "TencentARC/t2iadapter_canny_sd15v2",
    "depth_midas": "TencentARC/t2iadapter_depth_sd15v2",
    "openpose": "TencentARC/t2iadapter_openpose_sd14v1",
    "scribble_pidinet": "TencentARC/t2iadapter_sketch_sd15v2",
}
"""Name of a detector in controlnet_aux to the T2I-Adapter for Stable Diffusion 1.x that was trained with it."""

CONTROL_HELP = (
    "'openpose=photo.jpg': detector of controlnet_aux and picture; 'openpose@MODEL=photo.jpg' for another ControlNet;"
    " 'image@MODEL=pose.png' for a finished condition image. May be repeated."
)
ADAPTER_HELP = (
    f"The same with a T2I-Adapter, instead of a ControlNet; known for {', '.join(ADAPTERS)}. "
    "'image@toyland=places.png' for Toyland's own."
)


@dataclass(frozen=True)
class Control:
    """One ControlNet or T2I-Adapter and the picture it follows.

    Args:
        detector: A detector's name, or ``image``.
        model: Hub id or folder of the ControlNet or T2I-Adapter.
        picture: The file.
    """

    detector: str
    model: str
    picture: Path


def parse_controls(texts: Sequence[str], known: Mapping[str, str], *, called: str) -> tuple[Control, ...]:
    """Read every text, see `parse_control`.

    Raises:
        ConfigurationError: Names all that are wrong.
    """
    controls, defects = [], []
    for text in texts:
        try:
            controls.append(parse_control(text, known, called=called))
        except ConfigurationError as error:
            defects.append(str(error))
    if defects:
        raise ConfigurationError(" ".join(defects))
    return tuple(controls)


def parse_control(text: str, known: Mapping[str, str] = CONTROLNETS, *, called: str = "ControlNet") -> Control:
    """Read ``detector=picture`` or ``detector@model=picture``.

    Args:
        text: What the user gave.
        known: Detector to model.
        called: What errors call such a model.

    Raises:
        ConfigurationError: If the text is not of that form, the picture is missing, or no model is known.
    """
    left, equals, picture = text.partition("=")
    detector, _, model = left.partition("@")
    defects = []
    if not equals or not detector or not picture:
        defects.append("it is not of the form 'detector=picture', e.g. 'openpose=photo.jpg'")
    elif not Path(picture).is_file():
        defects.append(f"there is no file {picture}")
    if detector and equals and not model and detector not in known:
        names = ", ".join(sorted(known))
        defects.append(f"no {called} is known for {detector!r}; known are {names}, or name it: '{detector}@MODEL=...'")
    if defects:
        raise ConfigurationError(f"Control {text!r}: " + "; ".join(defects) + ".")
    return Control(detector, model or known[detector], Path(picture))


def refuse_other_models(controls: Sequence[Control], family: Family | None) -> None:
    """Refuse models for Stable Diffusion 1.x, which are taken where none is named, beside a base of SDXL.

    Args:
        controls: ControlNets or T2I-Adapters.
        family: The base model's family; None if it is not known.

    Raises:
        ConfigurationError: Names all of them, and how to name other models.
    """
    if family is not STABLE_DIFFUSION_XL:
        return
    of_sd1 = {*CONTROLNETS.values(), *ADAPTERS.values()}
    if unfit := [control for control in controls if control.model in of_sd1]:
        models = " and ".join(dict.fromkeys(control.model for control in unfit))
        named = " and ".join(f"'{control.detector}@MODEL={control.picture}'" for control in unfit)
        raise ConfigurationError(
            f"The base model is of {family.name}, for which no model is known that follows a picture; {models} would "
            f"be taken, of Stable Diffusion 1.x. Name a model for {family.name}: {named}."
        )


def make_condition_image(control: Control, picture: Image.Image | None = None) -> Image.Image:
    """Run the control's detector on its picture.

    Args:
        control: Names detector and file.
        picture: Content of the file, RGB; by default it is read.

    Raises:
        MissingExtraError: If controlnet_aux is needed and cannot be imported.
        PictureError: If the picture cannot be read.
        ConfigurationError: If controlnet_aux has no such detector, or the detector lacks a package or its weights.
    """
    from diffusers_mixofshow.pictures import read_image

    picture = picture or read_image(control.picture, called=str(control.picture))
    if control.detector == IMAGE:
        return picture
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing controlnet_aux gives ten, none of which the user can help
        processor = _import_processor(control.detector)
        try:
            return processor(control.detector)(picture)
        except (ValueError, OSError, AttributeError, NameError) as error:
            raise ConfigurationError(
                f"controlnet_aux cannot run its detector {control.detector!r}: {_explain(error)}. Or give a finished"
                " condition image: 'image@MODEL=...'."
            ) from error


def _import_processor(detector: str) -> Any:
    """Import controlnet_aux's class for all detectors."""
    try:
        from controlnet_aux.processor import Processor
    except (ImportError, AttributeError, RuntimeError) as error:
        # AttributeError: a mediapipe without `solutions`. RuntimeError: a torchvision made for another torch.
        raise MissingExtraError(
            f"Detector {detector!r} needs controlnet_aux, which cannot be imported: {first_line(error)}."
            f" {_suggest_remedy(error)}, or give a finished condition image: 'image@MODEL=...'."
        ) from error
    return Processor


def _suggest_remedy(error: Exception) -> str:
    if "mediapipe" in str(error):
        return 'Uninstall mediapipe, or install "mediapipe<0.10.30"'
    if "torchvision" in str(error):
        return "Install the torchvision that belongs to the installed torch (both for the CPU, or both for CUDA)"
    return 'Install it with pip install "diffusers-mixofshow[controlnet]"'


def _explain(error: Exception) -> str:
    if isinstance(error, NameError) and "mp_" in str(error):
        return 'it needs the package mediapipe, pip install "mediapipe<0.10.30"'
    if isinstance(error, AttributeError):
        return f"this version of controlnet_aux cannot make it ({first_line(error)})"
    return first_line(error).rstrip(".")


def add_controls(pipe: MixOfShowPipeline, controls: Sequence[Control]) -> MixOfShowControlNetPipeline:
    """Make a ControlNet pipeline of the same components and concepts.

    Raises:
        ConfigurationError: If a ControlNet cannot be found or read.
    """
    from diffusers import ControlNetModel

    from diffusers_mixofshow.pipelines import choose_pipeline

    nets = _load_models(pipe, controls, ControlNetModel.from_pretrained, "ControlNet")
    made: MixOfShowControlNetPipeline = choose_pipeline(pipe.components, "ControlNet").from_pipe(
        pipe, controlnet=nets[0] if len(nets) == 1 else nets, **dtype_argument(pipe.dtype)
    )
    return made


def add_adapters(pipe: MixOfShowPipeline, adapters: Sequence[Control]) -> MixOfShowAdapterPipeline:
    """Make a pipeline of the same components and concepts that follows T2I-Adapters.

    Raises:
        ConfigurationError: If a T2I-Adapter cannot be found or read.
    """
    from diffusers import T2IAdapter

    from diffusers_mixofshow import toyland
    from diffusers_mixofshow.pipelines import choose_pipeline

    def load(place: str, **options: Any) -> T2IAdapter:
        if place == location_of(TOYLAND):
            return toyland.load_layout_adapter()
        return T2IAdapter.from_pretrained(place, **options)

    models = _load_models(pipe, adapters, load, "T2I-Adapter")
    made: MixOfShowAdapterPipeline = choose_pipeline(pipe.components, "Adapter").from_pipe(pipe, adapter=models)
    return made


def _load_models(
    pipe: MixOfShowPipeline, controls: Sequence[Control], load: Callable[..., Any], called: str
) -> list[Any]:
    """Load the model of each control, to the pipeline's device and dtype."""
    from diffusers_mixofshow.edlora.models import load_model

    refuse_other_models(controls, family_of(pipe.components))
    models = []
    for control in controls:
        try:
            model = load_model(control.model, load, index="config.json")
        except HubError:
            raise
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise ConfigurationError(f"The {called} {control.model!r} cannot be loaded: {reason}.") from error
        models.append(model.to(device=pipe.device, dtype=pipe.dtype))
    return models
