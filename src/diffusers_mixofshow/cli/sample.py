"""``mixofshow sample``: pictures from prompts, concepts and regions."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusers_mixofshow.atomic import refuse_unwritable, write_picture
from diffusers_mixofshow.base_models import usual_guidance
from diffusers_mixofshow.cli.base_model import BASE_HELP, MOST_STEPS, common_base, load_base
from diffusers_mixofshow.cli.control import CONTROL_HELP, Control, condition_image, parse_control, with_controls
from diffusers_mixofshow.cli.plans import DryRun, plan_of_sampling, tell
from diffusers_mixofshow.cli.sources import read_pack
from diffusers_mixofshow.concepts import split_prompt
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowWarning, RegionError


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.regions import Layout, Region


Refine = Annotated[
    bool, typer.Option("--refine", help="Draw every region anew at a higher resolution, from its own prompt.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print files, seeds and settings as JSON.")]

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_GRAIN = 8
"""Stable Diffusion pipelines draw pictures whose sides are multiples of so many pixels."""


def sample(
    prompt: Annotated[
        str | None, typer.Option(help="What to draw; <name> stands for a concept. (default: the layout's)")
    ] = None,
    concepts: Annotated[
        list[str] | None, typer.Option(help="ED-LoRA or fused pack: Hub id, folder or file. May be repeated.")
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(help="'left,top,right,bottom:prompt' with fractions of the picture. May be repeated."),
    ] = None,
    layout: Annotated[
        Path | None, typer.Option(help="JSON file with prompt, size and regions, see docs/regional_sampling.md.")
    ] = None,
    control: Annotated[list[str] | None, typer.Option(help=CONTROL_HELP)] = None,
    output: Annotated[Path, typer.Option(help="PNG file; several pictures get numbers.")] = Path("sample.png"),
    base: Annotated[str | None, typer.Option(help=f"{BASE_HELP} (default: the concepts' own)")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid. (default: the layout's)")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others count on.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 1,
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps.")] = 20,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale. (default: 7.5; toyland: 3)")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=_GRAIN, help="Width in pixels. (default: the layout's or the model's)")
    ] = None,
    height: Annotated[int | None, typer.Option(min=_GRAIN, help="Height in pixels. (default: likewise)")] = None,
    refine: Refine = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Sample pictures of one or several concepts, each in its own region.

    \b
    Example:
      mixofshow sample --concepts hogwarts --prompt "two people near the castle" \\
        --region "0,0.2,0.5,1:a <potter>" --region "0.5,0.2,1,1:a <hermione>"
    """
    plan = _planned(layout, region or [], prompt, negative_prompt, width, height)
    _refuse_contradictions(plan, output, guidance, refine=refine)
    controls = [parse_control(text) for text in control or []]
    packs = [read_pack(source) for source in concepts or []]
    base, files = base or _base_of(packs), numbered(output, count)
    guidance = usual_guidance(base) if guidance is None else guidance
    _warn_of_bare_names(plan, packs)
    if dry_run:
        _refuse_unknown(plan, packs)
        planned = plan_of_sampling(plan, packs, base, steps=steps, guidance=guidance, refine=refine, output=files)
        tell(planned, as_json=as_json)
        return
    seeds = range(seed, seed + count)
    _save(files, _sampled(base, packs, controls, plan, seeds, steps=steps, guidance=guidance, refine=refine))
    if as_json:
        pictures = [{"file": str(file), "seed": each} for file, each in zip(files, seeds, strict=True)]
        told = {"base": base, "prompt": plan.prompt, "regions": len(plan.regions)}
        typer.echo(json.dumps({"pictures": pictures, **told, "steps": steps, "guidance": guidance}))
        return
    for file in files:
        typer.echo(f"Wrote {file}")


def _base_of(packs: list[EDLoRA]) -> str:
    """The base model that all packs were tuned on."""
    if not packs:
        raise ConfigurationError("Got neither concepts nor a base model. Give --concepts, or --base, or both.")
    return common_base(packs)


def _sampled(
    base: str,
    packs: list[EDLoRA],
    controls: list[Control],
    plan: Layout,
    seeds: range,
    *,
    steps: int,
    guidance: float,
    refine: bool,
) -> list[Any]:
    """One PIL picture for each seed, in one batch."""
    import torch

    pipe, conditions = _loaded(base, packs, controls)
    images: list[Any] = pipe(
        prompt=[plan.prompt] * len(seeds),
        negative_prompt=[plan.negative_prompt or ""] * len(seeds),
        regions=plan,
        num_inference_steps=steps,
        guidance_scale=guidance,
        **_size(pipe, plan),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **conditions,
    ).images
    return (
        [_refined(pipe, *each, plan, steps, guidance) for each in zip(images, seeds, strict=True)]
        if refine
        else images
    )


def _refined(pipe: Any, image: Any, seed: int, plan: Layout, steps: int, guidance: float) -> Any:
    """The picture with its regions drawn anew; the same for a seed, whatever other pictures there are."""
    import torch

    from diffusers_mixofshow.pipelines import refine_regions

    return refine_regions(
        pipe,
        [image],
        plan.regions,
        generator=torch.Generator().manual_seed(seed),
        negative_prompt=plan.negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )[0]


def _refuse_unknown(plan: Layout, packs: list[EDLoRA]) -> None:
    """Refuse concepts in prompts that no pack holds."""
    known = [concept for pack in packs for concept in pack.concepts]
    for text in _texts(plan):
        split_prompt(text, known)


def _warn_of_bare_names(plan: Layout, packs: list[EDLoRA]) -> None:
    """Warn of concepts that are nowhere asked for while a prompt has their name as a plain word."""
    texts = _texts(plan)
    for concept in (concept for pack in packs for concept in pack.concepts):
        asked_for = any(name in text for name in (concept.placeholder, *concept.tokens) for text in texts)
        bare = re.compile(rf"(?<![\w<]){re.escape(concept.name)}(?![\w>])", re.IGNORECASE)
        found = next((match[0] for text in texts if (match := bare.search(text))), None)
        if found and not asked_for:
            warnings.warn(
                f"the prompt says {found}; did you mean {concept.placeholder}?", MixOfShowWarning, stacklevel=2
            )


def _texts(plan: Layout) -> list[str]:
    return [plan.prompt or "", *(region.prompt for region in plan.regions)]


def _size(pipe: Any, plan: Layout) -> dict[str, int]:
    """Height and width in pixels; diffusers would forget one that is given alone."""
    cells = pipe.unet.config.sample_size
    height, width = (cells, cells) if isinstance(cells, int) else cells
    scale = pipe.vae_scale_factor
    return {"height": plan.height or height * scale, "width": plan.width or width * scale}


def _refuse_contradictions(plan: Layout, output: Path, guidance: float | None, *, refine: bool) -> None:
    """Raise one error that lists what would fail only after everything has been loaded or drawn."""
    defects = []
    if refine and not plan.regions:
        defects.append("--refine without any region to draw anew; give --region or --layout, too")
    if output.suffix.lower() not in _FORMATS:
        defects.append(f"--output {output}, expected a file that ends in {', '.join(_FORMATS)}")
    elif output.is_dir():
        defects.append(f"--output {output} is a folder, expected a file")
    if guidance is not None and not math.isfinite(guidance):
        defects.append(f"--guidance {guidance}, expected a number such as 7.5")
    defects += [
        f"a {name} of {value} pixels, expected a multiple of {_GRAIN}"
        for name, value in (("width", plan.width), ("height", plan.height))
        if value is not None and value % _GRAIN
    ]
    if defects:
        raise ConfigurationError(f"Got {'; '.join(defects)}.")
    refuse_unwritable(output)


def _save(files: list[Path], images: list[Any]) -> None:
    for path, image in zip(files, images, strict=True):
        write_picture(path, image, _FORMATS[path.suffix.lower()])


def _loaded(base: str, packs: list[EDLoRA], controls: list[Control]) -> tuple[Any, dict[str, Any]]:
    """The pipeline with its concepts and ControlNets, and what its call needs for these."""
    views = [condition_image(control) for control in controls]  # first: it fails at once where the extra is missing
    pipe = load_base(base)
    for pack in packs:
        pipe.load_edlora(pack)
    if not controls:
        return pipe, {}
    return with_controls(pipe, controls), {"image": views[0] if len(views) == 1 else views}


def _planned(
    file: Path | None,
    regions: list[str],
    prompt: str | None,
    negative_prompt: str | None,
    width: int | None,
    height: int | None,
) -> Layout:
    """The layout of the file, with what the options say instead or more."""
    from diffusers_mixofshow.regions import Layout

    plan = Layout() if file is None else Layout.load(file)
    if prompt is None and plan.prompt is None:
        raise ConfigurationError("Got no prompt. Give --prompt, or --layout with a file that has one.")
    return Layout(
        (*plan.regions, *(parse_region(text) for text in regions)),
        prompt=plan.prompt if prompt is None else prompt,
        negative_prompt=plan.negative_prompt if negative_prompt is None else negative_prompt,
        width=width or plan.width,
        height=height or plan.height,
    )


def parse_region(text: str) -> Region:
    """Read ``left,top,right,bottom:prompt``.

    Raises:
        RegionError: If the text is not of that form, or the box is not inside the picture.
    """
    from diffusers_mixofshow.regions import Region

    numbers, _, prompt = text.partition(":")
    try:
        left, top, right, bottom = (float(number) for number in numbers.split(","))
    except ValueError as error:
        raise RegionError(
            f"Region {text!r} is not of the form 'left,top,right,bottom:prompt', e.g. '0,0,0.5,1:a <potter>'."
        ) from error
    return Region(prompt.strip(), box=(left, top, right, bottom))


def numbered(path: Path, count: int) -> list[Path]:
    """One file name for each picture: ``x.png``, or ``x-0.png``, ``x-1.png``, ..."""
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{index}") for index in range(count)]
