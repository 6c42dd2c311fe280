"""Condition images on the command line: a detector's view of a picture, and the ControlNet that follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_mixofshow.base_models import in_dtype
from diffusers_mixofshow.errors import ConfigurationError, MissingExtraError


if TYPE_CHECKING:
    from PIL import Image

    from diffusers_mixofshow.pipelines import MixOfShowControlNetPipeline, MixOfShowPipeline

IMAGE = "image"
"""Stands for a condition image that needs no detector."""

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
"""Detectors of controlnet_aux by their names there, and the ControlNet for Stable Diffusion 1.5 made for each."""

CONTROL_HELP = (
    "'openpose=photo.jpg': detector of controlnet_aux and picture; 'openpose@MODEL=photo.jpg' for another ControlNet;"
    " 'image@MODEL=pose.png' for a finished condition image. May be repeated."
)


@dataclass(frozen=True)
class Control:
    """One ControlNet and the picture it follows.

    Args:
        detector: A detector's name, or ``image``.
        model: Hub id or folder of the ControlNet.
        picture: The file.
    """

    detector: str
    model: str
    picture: Path


def parse_control(text: str) -> Control:
    """Read ``detector=picture`` or ``detector@model=picture``.

    Raises:
        ConfigurationError: If the text is not of that form, the picture is missing, or no ControlNet is known.
    """
    left, equals, picture = text.partition("=")
    detector, _, model = left.partition("@")
    defects = []
    if not equals or not detector or not picture:
        defects.append("it is not of the form 'detector=picture', e.g. 'openpose=photo.jpg'")
    elif not Path(picture).is_file():
        defects.append(f"there is no file {picture}")
    if detector and equals and not model and detector not in CONTROLNETS:
        known = ", ".join(sorted(CONTROLNETS))
        defects.append(
            f"no ControlNet is known for {detector!r}; known are {known}, or name it: '{detector}@MODEL=...'"
        )
    if defects:
        raise ConfigurationError(f"Control {text!r}: " + "; ".join(defects) + ".")
    return Control(detector, model or CONTROLNETS[detector], Path(picture))


def condition_image(control: Control) -> Image.Image:
    """What the control's detector sees in its picture.

    Raises:
        MissingExtraError: If controlnet_aux is needed and cannot be imported.
        ConfigurationError: If it has no such detector, or the detector lacks a package or its weights.
    """
    from PIL import Image

    picture = Image.open(control.picture).convert("RGB")
    if control.detector == IMAGE:
        return picture
    try:
        from controlnet_aux.processor import Processor
    except (ImportError, AttributeError) as error:  # AttributeError: with a mediapipe that has no `solutions`
        raise MissingExtraError(
            f"Detector {control.detector!r} needs controlnet_aux, which cannot be imported ({error}). Install it with"
            " pip install 'diffusers-mixofshow[controlnet]', or give a finished condition image: 'image@MODEL=...'."
        ) from error
    try:
        return Processor(control.detector)(picture)
    except (ValueError, NameError, OSError) as error:  # NameError: mediapipe_face without mediapipe
        raise ConfigurationError(f"controlnet_aux cannot run its detector {control.detector!r}: {error}") from error


def with_controls(pipe: MixOfShowPipeline, controls: Sequence[Control]) -> MixOfShowControlNetPipeline:
    """Make a ControlNet pipeline of the same components and concepts.

    Raises:
        ConfigurationError: If a ControlNet cannot be found or read.
    """
    from diffusers import ControlNetModel

    from diffusers_mixofshow.pipelines import MixOfShowControlNetPipeline

    nets: list[Any] = []
    for control in controls:
        try:
            net = ControlNetModel.from_pretrained(control.model)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"The ControlNet {control.model!r} cannot be loaded: {error}") from error
        nets.append(net.to(device=pipe.device, dtype=pipe.dtype))
    return MixOfShowControlNetPipeline.from_pipe(
        pipe, controlnet=nets[0] if len(nets) == 1 else nets, **in_dtype(pipe.dtype)
    )
