"""The options of ``mixofshow sample``, in the order and the groups of its help."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from diffusers_mixofshow.cli.base_model import BASE_HELP, GUIDANCE_HELP, LARGEST_SEED, MOST_STEPS, normalise_base
from diffusers_mixofshow.sampling.control import ADAPTER_HELP, CONTROL_HELP
from diffusers_mixofshow.sampling.drawing import GRAIN


_region_option = partial(typer.Option, rich_help_panel="Regions")
_followed_option = partial(typer.Option, rich_help_panel="Pictures to start from and to follow")
_setting_option = partial(typer.Option, rich_help_panel="Settings")
_result_option = partial(typer.Option, rich_help_panel="Result")


class Dtype(StrEnum):
    """Type of the weights."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


Prompt = Annotated[str | None, typer.Option(help="What to draw; <name> stands for a concept. (default: the layout's)")]
Concepts = Annotated[
    list[str] | None, typer.Option(help="ED-LoRA, fused pack or plain LoRA: Hub id, folder or file. May be repeated.")
]
Base = Annotated[str | None, typer.Option(help=f"{BASE_HELP} (default: the concepts' own)", callback=normalise_base)]
NegativePrompt = Annotated[str | None, typer.Option(help="What to avoid. (default: the layout's)")]

Region = Annotated[
    list[str] | None,
    _region_option(
        help="'left,top,right,bottom:prompt' with fractions of the picture, or 'mask=FILE:prompt', white inside. "
        "Settings follow a comma before the colon: weight=, feather=, order=, guidance_scale=, start=, end=, "
        "control_scale=, rounding=. May be repeated."
    ),
]
LayoutFile = Annotated[
    Path | None,
    _region_option(
        help="JSON file with prompt, size and regions, see docs/regional_sampling.md; or a picture from 'sample'."
    ),
]
Isolate = Annotated[
    bool, _region_option("--isolation", help="Keep the regions apart in self-attention, too.", show_default=False)
]
IsolationSteps = Annotated[
    str | None, _region_option(help="Part of the steps with isolation: '0,0.5'. (default: all)")
]
IsolationScales = Annotated[
    str | None,
    _region_option(
        help="Feature maps with isolation, by the width of their cells in latent cells: '2,4,8'. (default: all)"
    ),
]
Drafted = Annotated[
    bool | None,
    _region_option(
        "--draft/--no-draft",
        help="Draw every region alone in a few steps, then put it into the picture, so that its prompt need not "
        "describe the others. (default: on, but not with --image, --control or --adapter)",
    ),
]
Refine = Annotated[
    bool,
    _region_option("--refine", help="Redraw every region at a higher resolution in the end, from its own prompt."),
]

Image = Annotated[Path | None, _followed_option(help="Picture to start from: image to image.")]
Mask = Annotated[Path | None, _followed_option(help="White where --image is to be redrawn: inpainting.")]
Strength = Annotated[
    float | None,
    _followed_option(help="How strongly --image is redrawn, above 0 and up to 1. (default: 0.8; with --mask: 1)"),
]
Control = Annotated[list[str] | None, _followed_option(help=CONTROL_HELP)]
Adapter = Annotated[list[str] | None, _followed_option(help=ADAPTER_HELP)]
ControlScale = Annotated[
    list[float] | None,
    _followed_option(
        help="Strength of --control or --adapter: one for all, or one for each, in their order. (default: 1)"
    ),
]

Seed = Annotated[
    int,
    _setting_option(
        min=-LARGEST_SEED, max=LARGEST_SEED, help="Seed of the first picture; the next has the next seed."
    ),
]
Steps = Annotated[int, _setting_option(min=1, max=MOST_STEPS, help="Denoising steps.")]
Guidance = Annotated[float | None, _setting_option(help=GUIDANCE_HELP)]
LoraScale = Annotated[
    list[float] | None,
    _setting_option(
        help="Strength of the concepts' weight updates: one for all --concepts, or one for each. (default: 1)"
    ),
]
Width = Annotated[
    int | None, _setting_option(min=GRAIN, help="Width in pixels. (default: the layout's, the image's or the model's)")
]
Height = Annotated[
    int | None,
    _setting_option(min=GRAIN, help="Height in pixels. (default: the layout's, the image's or the model's)"),
]
Device = Annotated[
    str | None, _setting_option(help="Where to draw, such as cuda or cpu. (default: cuda if there is one)")
]
WeightType = Annotated[
    Dtype | None,
    _setting_option(
        "--dtype",
        help="Type of the weights. (default: on cuda float16, but float32 for toyland and bfloat16 for bases that "
        "draw no concepts; else float32)",
    ),
]

Output = Annotated[Path, _result_option(help="PNG, JPEG or WebP file; several pictures get numbers.")]
Count = Annotated[int, _result_option(min=1, help="How many pictures.")]
AsJson = Annotated[bool, _result_option("--json", help="Print files, seeds and settings as JSON.")]
