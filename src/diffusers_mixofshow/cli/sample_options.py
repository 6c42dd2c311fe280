"""The options of ``mixofshow sample``, in the order and the groups of its help."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from diffusers_mixofshow.cli.base_model import BASE_HELP, MOST_STEPS, normalise_base
from diffusers_mixofshow.sampling.control import ADAPTER_HELP, CONTROL_HELP
from diffusers_mixofshow.sampling.drawing import GRAIN


_REGIONS, _FOLLOWED, _SETTINGS, _RESULT = "Regions", "Pictures to start from and to follow", "Settings", "Result"
_LARGEST_SEED = 2**63 - 1


class Dtype(StrEnum):
    """Type of the weights."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


Prompt = Annotated[str | None, typer.Option(help="What to draw; <name> stands for a concept. (default: the layout's)")]
Concepts = Annotated[
    list[str] | None, typer.Option(help="ED-LoRA or fused pack: Hub id, folder or file. May be repeated.")
]
Base = Annotated[str | None, typer.Option(help=f"{BASE_HELP} (default: the concepts' own)", callback=normalise_base)]
NegativePrompt = Annotated[str | None, typer.Option(help="What to avoid. (default: the layout's)")]

Region = Annotated[
    list[str] | None,
    typer.Option(
        help="'left,top,right,bottom:prompt' with fractions of the picture, or 'mask=FILE:prompt', white inside. "
        "Settings follow a comma before the colon: weight=, feather=, order=, guidance_scale=, start=, end=, "
        "control_scale=, rounding=. May be repeated.",
        rich_help_panel=_REGIONS,
    ),
]
LayoutFile = Annotated[
    Path | None,
    typer.Option(
        help="JSON file with prompt, size and regions, see docs/regional_sampling.md; or a picture from 'sample'.",
        rich_help_panel=_REGIONS,
    ),
]
Isolate = Annotated[
    bool,
    typer.Option(
        "--isolation",
        help="Keep the regions apart in self-attention, too.",
        rich_help_panel=_REGIONS,
        show_default=False,
    ),
]
IsolationSteps = Annotated[
    str | None,
    typer.Option(help="Part of the steps with isolation: '0,0.5'. (default: all)", rich_help_panel=_REGIONS),
]
IsolationScales = Annotated[
    str | None,
    typer.Option(
        help="Feature maps with isolation, by the width of their cells in latent cells: '2,4,8'. (default: all)",
        rich_help_panel=_REGIONS,
    ),
]
Drafted = Annotated[
    bool | None,
    typer.Option(
        "--draft/--no-draft",
        help="Draw every region alone in a few steps, then put it into the picture, so that its prompt need not "
        "describe the others. (default: on, but not with --image, --control or --adapter)",
        rich_help_panel=_REGIONS,
    ),
]
Refine = Annotated[
    bool,
    typer.Option(
        "--refine",
        help="Redraw every region at a higher resolution in the end, from its own prompt.",
        rich_help_panel=_REGIONS,
    ),
]

Image = Annotated[Path | None, typer.Option(help="Picture to start from: image to image.", rich_help_panel=_FOLLOWED)]
Mask = Annotated[
    Path | None,
    typer.Option(help="White where --image is to be redrawn: inpainting.", rich_help_panel=_FOLLOWED),
]
Strength = Annotated[
    float | None,
    typer.Option(
        help="How strongly --image is redrawn, above 0 and up to 1. (default: 0.8; with --mask: 1)",
        rich_help_panel=_FOLLOWED,
    ),
]
Control = Annotated[list[str] | None, typer.Option(help=CONTROL_HELP, rich_help_panel=_FOLLOWED)]
Adapter = Annotated[list[str] | None, typer.Option(help=ADAPTER_HELP, rich_help_panel=_FOLLOWED)]
ControlScale = Annotated[
    list[float] | None,
    typer.Option(
        help="Strength of --control or --adapter: one for all, or one for each, in their order. (default: 1)",
        rich_help_panel=_FOLLOWED,
    ),
]

Seed = Annotated[
    int,
    typer.Option(
        min=-_LARGEST_SEED,
        max=_LARGEST_SEED,
        help="Seed of the first picture; the next has the next seed.",
        rich_help_panel=_SETTINGS,
    ),
]
Steps = Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps.", rich_help_panel=_SETTINGS)]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Classifier-free guidance scale. (default: 7.5; SDXL: 5; toyland: 3)", rich_help_panel=_SETTINGS
    ),
]
LoraScale = Annotated[
    list[float] | None,
    typer.Option(
        help="Strength of the concepts' weight updates: one for all --concepts, or one for each. (default: 1)",
        rich_help_panel=_SETTINGS,
    ),
]
Width = Annotated[
    int | None,
    typer.Option(
        min=GRAIN,
        help="Width in pixels. (default: the layout's, the image's or the model's)",
        rich_help_panel=_SETTINGS,
    ),
]
Height = Annotated[
    int | None,
    typer.Option(
        min=GRAIN,
        help="Height in pixels. (default: the layout's, the image's or the model's)",
        rich_help_panel=_SETTINGS,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where to draw, such as cuda or cpu. (default: cuda if there is one)", rich_help_panel=_SETTINGS
    ),
]
WeightType = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        help="Type of the weights. (default: float16 on cuda but for toyland, else float32)",
        rich_help_panel=_SETTINGS,
    ),
]

Output = Annotated[
    Path,
    typer.Option(help="PNG, JPEG or WebP file; several pictures get numbers.", rich_help_panel=_RESULT),
]
Count = Annotated[int, typer.Option(min=1, help="How many pictures.", rich_help_panel=_RESULT)]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print files, seeds and settings as JSON.", rich_help_panel=_RESULT)
]
