"""Draw what ``mixofshow sample`` was asked for: all of its settings in one object, and the drawing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_mixofshow.base_models import location_of
from diffusers_mixofshow.concepts import split_prompt
from diffusers_mixofshow.errors import ConfigurationError, PictureError, first_line, warn
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.sampling.control import Control, add_adapters, add_controls, make_condition_image
from diffusers_mixofshow.sampling.loading import load_base
from diffusers_mixofshow.sampling.other_families import find_other_family, make_refusal
from diffusers_mixofshow.sampling.vocabulary import warn_of_unknown_words


if TYPE_CHECKING:
    from PIL import Image

    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.regions import Draft, Isolation, Layout, Refinement

GRAIN = 8
"""Stable Diffusion pipelines draw pictures whose sides are multiples of this many pixels."""
_LARGE = 1024 * 1024
"""Number of pixels above which a picture to start from gives a warning."""
_INPAINTING_CHANNELS = (4, 9)
"""Input channels of U-Nets with which diffusers can inpaint."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """A picture that the user gave, as its file was when it was read.

    Args:
        path: The file.
        image: RGB; a mask is of mode L, white inside.
        digest: SHA-256 of the file.
    """

    path: Path
    image: Image.Image
    digest: str

    @classmethod
    def read(cls, path: Path, *, as_mask: bool = False) -> Given:
        """Read a file once, for the picture and the digest.

        Raises:
            PictureError: If it cannot be read, or is meant as a mask and cannot be understood as one.
        """
        from diffusers_mixofshow.masks import load_mask
        from diffusers_mixofshow.pictures import FileContent, read_image

        try:
            content = FileContent(path)
        except OSError as error:
            raise PictureError(f"{path} cannot be read: {error.strerror or error}.") from error
        called = str(path)
        image = load_mask(content, called=called).grey if as_mask else read_image(content, called=called)
        return cls(path=path, image=image, digest=content.digest)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """All settings that determine the pictures.

    Args:
        base: The base model.
        packs: Source of each ED-LoRA or fused pack to its content.
        lora_scales: Strength of the weight updates of each pack.
        plan: Prompts, regions and size.
        seeds: One for each picture.
        steps: Denoising steps.
        guidance: Guidance scale.
        isolation: Whether regions are kept apart in self-attention.
        draft: Whether regions are first drawn alone.
        refine: Whether regions are redrawn afterwards.
        image: Picture to start from.
        mask: Where that picture is redrawn.
        strength: Strength with which it is redrawn.
        controls: ControlNets with the files of their pictures.
        adapters: T2I-Adapters with the files of their pictures.
        followed: The pictures of the ControlNets, or of the T2I-Adapters.
        control_scales: Strength of each ControlNet or T2I-Adapter.
        device: Where to draw; None for the GPU where there is one.
        dtype: Name of the weights' type; None for the device's default.
    """

    base: str
    packs: Mapping[str, EDLoRA]
    lora_scales: tuple[float, ...]
    plan: Layout
    seeds: range
    steps: int
    guidance: float
    isolation: Isolation | None
    draft: Draft | None
    refine: Refinement | None
    image: Given | None
    mask: Given | None
    strength: float
    controls: tuple[Control, ...]
    adapters: tuple[Control, ...]
    followed: tuple[Given, ...]
    control_scales: tuple[float, ...]
    device: str | None
    dtype: str | None

    @property
    def prompts(self) -> list[str]:
        """The global prompt and those of the regions."""
        return [self.plan.prompt or "", *(region.prompt for region in self.plan.regions)]

    @property
    def way(self) -> str:
        """How the pictures are drawn, in words."""
        if self.image is not None and self.mask is not None:
            return f"inpainting of {self.image.path} where {self.mask.path} is white, strength {self.strength:g}"
        if self.image is not None:
            return f"image to image from {self.image.path}, strength {self.strength:g}"
        if followed := self.controls or self.adapters:
            called = "ControlNet" if self.controls else "T2I-Adapter"
            pairs = zip(followed, self.control_scales, strict=True)
            each = [f"{control.model} on {control.picture}, strength {scale:g}" for control, scale in pairs]
            return f"text to image under {called} {', '.join(each)}"
        return "text to image"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The pictures, with what only the loaded pipeline knows.

    Args:
        images: PIL pictures, one for each seed.
        scheduler: Class of the pipeline's scheduler.
        device: Type of the device on which it drew.
        dtype: Name of the denoiser's type.
    """

    images: list[Image.Image]
    scheduler: type
    device: str
    dtype: str


def draw(drawing: Drawing, pipe: Any = None) -> Drawn:
    """Draw one picture for each seed, in one batch.

    Args:
        drawing: The settings.
        pipe: The base model, if it is loaded already; the packs are unloaded from it again. None loads the base.
    """
    views = _prepare_views(drawing)  # before the base is loaded, as it may fail
    warn_of_strange_words(drawing)
    other = find_other_family(drawing.base, drawing.packs.values()) if pipe is None else None
    if pipe is None:
        pipe = load_base(drawing.base, drawing.device, drawing.dtype, concepts=other is None)
    with _load_packs(pipe, drawing):
        return _draw(pipe, drawing, views) if other is None else _describe_drawn(pipe, _draw_prompt(pipe, drawing))


def refuse_other_settings(drawing: Drawing) -> None:
    """Refuse what a base model of another family cannot draw; bases of a family that draws concepts can all of it.

    Raises:
        ConfigurationError: If there is no pipeline for it, or anything but a prompt and plain LoRAs is given.
        ConceptError: If the prompt names a concept.
    """
    family = find_other_family(drawing.base, drawing.packs.values())
    if family is None:
        return
    if not family.pipeline:
        raise ConfigurationError(
            f"The base model {drawing.base!r} is of {family.name}, of which diffusers has no pipeline that draws from "
            "a prompt alone. Expected another base."
        )
    given = {
        "concepts": any(pack.concepts for pack in drawing.packs.values()),
        "regions": drawing.plan.regions,
        "pictures to start from (--image)": drawing.image,
        "pictures to follow (--control, --adapter)": drawing.controls or drawing.adapters,
        "negative prompts": drawing.plan.negative_prompt and not family.takes_negative_prompt,
    }
    if refused := [name for name, is_given in given.items() if is_given]:
        raise make_refusal(drawing.base, family, ", ".join(refused))
    split_prompt(drawing.plan.prompt or "", [])


def warn_of_strange_words(drawing: Drawing) -> None:
    """Warn of words that the base was never shown; not beside plain LoRAs, which bring words of their own."""
    if all(pack.concepts for pack in drawing.packs.values()):
        concepts = [concept for pack in drawing.packs.values() for concept in pack.concepts]
        names = {concept.placeholder.strip("<>").lower() for concept in concepts}
        warn_of_unknown_words(drawing.base, drawing.prompts, names)


@contextmanager
def _load_packs(pipe: Any, drawing: Drawing) -> Iterator[None]:
    """Load the packs inside the block; all are unloaded afterwards, also if one of them cannot be loaded."""
    from diffusers_mixofshow.lora import loaded

    with ExitStack() as packs:
        for number, (pack, scale) in enumerate(zip(drawing.packs.values(), drawing.lora_scales, strict=True)):
            packs.enter_context(loaded(pipe, pack, scale, f"drawn_{number}"))
        yield


def _draw(pipe: Any, drawing: Drawing, views: list[Image.Image]) -> Drawn:
    """Draw with a base into which the packs are loaded."""
    import torch

    progress_bar = pipe._progress_bar_config
    pipe, conditions = _prepare_call(pipe, drawing, views)
    pipe.set_progress_bar_config(**progress_bar)
    plan, count = drawing.plan, len(drawing.seeds)
    images: list[Any] = pipe(
        prompt=[plan.prompt] * count,
        negative_prompt=None if plan.negative_prompt is None else [plan.negative_prompt] * count,
        regions=plan,
        isolation=drawing.isolation,
        draft=drawing.draft,
        refine=drawing.refine,
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in drawing.seeds],
        **conditions,
    ).images
    return _describe_drawn(pipe, images)


def _describe_drawn(pipe: Any, images: list[Any]) -> Drawn:
    """Put together the pictures and what the pipeline knows of them."""
    denoiser = pipe.components[family_of(pipe.components).denoiser]
    dtype = str(denoiser.dtype).removeprefix("torch.")
    return Drawn(images=images, scheduler=type(pipe.scheduler), device=pipe.device.type, dtype=dtype)


def _draw_prompt(pipe: Any, drawing: Drawing) -> list[Any]:
    """Draw one picture for each seed, in one batch.

    Raises:
        ConfigurationError: If the pipeline refuses the size or another setting.
    """
    import torch

    family, plan, count = family_of(pipe.components), drawing.plan, len(drawing.seeds)
    negative = {"negative_prompt": [plan.negative_prompt or ""] * count} if family.takes_negative_prompt else {}
    try:
        pictures: list[Any] = pipe(
            prompt=[plan.prompt] * count,
            height=plan.height,
            width=plan.width,
            num_inference_steps=drawing.steps,
            generator=[torch.Generator().manual_seed(seed) for seed in drawing.seeds],
            **{family.guidance_argument: drawing.guidance},
            **negative,
        ).images
    except ValueError as error:
        refused = f"{type(pipe).__name__} of diffusers cannot draw this: {first_line(error)}"
        raise ConfigurationError(refused) from error
    return pictures


def fit_layout(picture: Given, plan: Layout) -> Layout:
    """Give a layout the size of a picture that is redrawn; a side that the layout has is kept, in proportion."""
    if plan.width and plan.height:
        return plan
    own = picture.image
    scale = plan.width / own.width if plan.width else plan.height / own.height if plan.height else 1.0
    width, height = (max(GRAIN, round(side * scale / GRAIN) * GRAIN) for side in own.size)
    if scale == 1.0 and width * height > _LARGE:
        warn(
            f"{picture.path} is drawn at its own size of {width} x {height} pixels, which takes much time and memory, "
            "and is more than Stable Diffusion was trained with; --width or --height draws it smaller."
        )
    return replace(plan, width=plan.width or width, height=plan.height or height)


def refuse_inpainting(base: str) -> None:
    """Refuse a base on this disk whose U-Net cannot inpaint, before it is loaded."""
    file = Path(location_of(base)) / "unet" / "config.json"
    if file.is_file():
        _refuse_channels(base, json.loads(file.read_text(encoding="utf-8")).get("in_channels"))


def _refuse_channels(base: str, channels: object) -> None:
    if channels not in _INPAINTING_CHANNELS:
        raise ConfigurationError(
            f"--mask inpaints, which diffusers does with U-Nets of 4 or 9 input channels, but that of {base} has "
            f"{channels}. Start from the whole picture with --image alone, or take another base."
        )


def _prepare_views(drawing: Drawing) -> list[Image.Image]:
    """The pictures that the drawing starts from or follows, as the models see them."""
    if drawing.image is None:
        controls = (*drawing.controls, *drawing.adapters)
        pairs = zip(controls, drawing.followed, strict=True)
        return [make_condition_image(control, picture.image) for control, picture in pairs]
    picture = drawing.image.image
    size = drawing.plan.width or picture.width, drawing.plan.height or picture.height
    masks = [] if drawing.mask is None else [drawing.mask.image]
    return [view.resize(size) for view in (picture, *masks)]


def _prepare_call(pipe: Any, drawing: Drawing, views: list[Image.Image]) -> tuple[Any, dict[str, Any]]:
    """Make the pipeline for the drawing, and the arguments of its call beside prompts and settings."""
    from diffusers_mixofshow.pipelines import choose_pipeline

    count, size = len(drawing.seeds), _choose_size(pipe, drawing.plan)
    if drawing.mask is not None:
        _refuse_channels(drawing.base, pipe.unet.config.in_channels)
        image, mask = views
        pictures = {"image": [image] * count, "mask_image": [mask] * count, "strength": drawing.strength}
        return choose_pipeline(pipe.components, "Inpaint").from_pipe(pipe), pictures | size
    if drawing.image is not None:
        pictures = {"image": views * count, "strength": drawing.strength}
        return choose_pipeline(pipe.components, "Img2Img").from_pipe(pipe), pictures
    one = len(views) == 1
    scales: Any = drawing.control_scales[0] if one else list(drawing.control_scales)
    followed: dict[str, Any] = {"image": views[0] if one else views}
    if drawing.controls:
        pipe = add_controls(pipe, drawing.controls)
        return pipe, followed | {"controlnet_conditioning_scale": scales} | size
    if drawing.adapters:
        return add_adapters(pipe, drawing.adapters), followed | {"adapter_conditioning_scale": scales} | size
    return pipe, size


def _choose_size(pipe: Any, plan: Layout) -> dict[str, int]:
    """Choose height and width in pixels; both, because diffusers ignores one that is given alone."""
    from diffusers_mixofshow.families.layers import default_size

    (height, width), scale = default_size(pipe.unet), pipe.vae_scale_factor
    return {"height": plan.height or height * scale, "width": plan.width or width * scale}
