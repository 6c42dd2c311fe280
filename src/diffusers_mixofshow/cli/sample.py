"""``mixofshow sample``: draw pictures from prompts, concepts and regions."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffusers_mixofshow.atomic import check_outputs
from diffusers_mixofshow.base_models import embedded_base, known_family
from diffusers_mixofshow.cli import sample_options as options
from diffusers_mixofshow.cli.base_model import (
    choose_guidance,
    family_of_packs,
    find_common_base,
    refuse_strange_base,
)
from diffusers_mixofshow.cli.plans import DryRun, Overwrite, plan_replacing, plan_sampling, tell
from diffusers_mixofshow.cli.region_text import parse_isolation, parse_regions
from diffusers_mixofshow.cli.sources import open_packs
from diffusers_mixofshow.concepts import check_distinct, split_prompt
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families.stable_diffusion import SD1
from diffusers_mixofshow.sampling.control import ADAPTERS, CONTROLNETS, parse_controls, refuse_other_models
from diffusers_mixofshow.sampling.drawing import (
    GRAIN,
    Drawing,
    Given,
    draw,
    fit_layout,
    refuse_inpainting,
    refuse_other_settings,
    warn_of_strange_words,
)
from diffusers_mixofshow.sampling.loading import check_device
from diffusers_mixofshow.sampling.provenance import FORMATS, warn_of_changes, write_drawn


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.regions import Draft, Layout
    from diffusers_mixofshow.sampling.drawing import Drawn


def sample(
    prompt: options.Prompt = None,
    concepts: options.Concepts = None,
    base: options.Base = None,
    negative_prompt: options.NegativePrompt = None,
    region: options.Region = None,
    layout: options.LayoutFile = None,
    isolation: options.Isolate = False,
    isolation_steps: options.IsolationSteps = None,
    isolation_scales: options.IsolationScales = None,
    draft: options.Drafted = None,
    refine: options.Refine = False,
    image: options.Image = None,
    mask: options.Mask = None,
    strength: options.Strength = None,
    control: options.Control = None,
    adapter: options.Adapter = None,
    control_scale: options.ControlScale = None,
    seed: options.Seed = 0,
    steps: options.Steps = 20,
    guidance: options.Guidance = None,
    lora_scale: options.LoraScale = None,
    width: options.Width = None,
    height: options.Height = None,
    device: options.Device = None,
    dtype: options.WeightType = None,
    output: options.Output = Path("sample.png"),
    count: options.Count = 1,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Sample pictures of one or several concepts, each in its own region.

    Pictures store their settings: 'mixofshow --config x.png sample' draws x.png again.

    \b
    Examples, the second with what 'mixofshow demo' leaves:
      mixofshow sample --base toyland --prompt "a dog in snow" --output dog.png
      mixofshow sample --concepts mixofshow-demo/fused --output both.png \\
        --refine --prompt "a critter and a dog in a meadow" \\
        --region "0,0.25,0.5,0.97:a <kiki>, in a meadow" \\
        --region "0.5,0.25,1,0.97:a <rex>, in a meadow"
    """
    drawing = _read_drawing(dict(locals()))
    files = number_files(output, count)
    if dry_run:
        _refuse_unknown(drawing)
        _warn_of_prompts(drawing)
        tell(plan_sampling(drawing, files) | plan_replacing(*files, overwrite=overwrite), as_json=as_json)
        return
    check_device(device, dtype)
    drawn = draw(drawing)
    write_drawn(files, drawing, drawn)
    if as_json:
        pictures = [{"file": str(file), "seed": each} for file, each in zip(files, drawing.seeds, strict=True)]
        told = {"base": drawing.base, "prompt": drawing.plan.prompt, "regions": len(drawing.plan.regions)}
        typer.echo(json.dumps({"pictures": pictures, **told, "steps": steps, "guidance": drawing.guidance}))
        return
    _tell_written(files, drawn, drawing.base)


def _tell_written(files: Sequence[Path], drawn: Drawn, base: str) -> None:
    """Say where the pictures are and how large; on a terminal also why those of an embedded base are small."""
    for file, picture in zip(files, drawn.images, strict=True):
        typer.echo(f"Wrote {file}, {picture.width} x {picture.height} pixels")
    if embedded_base(base) and sys.stdout.isatty():
        larger = f"For large ones, tune and draw with a base such as --base {SD1.id} (download of 5 GB)."
        typer.echo(f"{base} is a small base, whose pictures are small: zoom in. {larger}")


def _read_drawing(asked: Mapping[str, Any]) -> Drawing:
    """Read and check everything that the options name."""
    plan = _build_layout(asked)
    _refuse_contradictions(plan, asked)
    files = number_files(asked["output"], asked["count"])
    check_outputs(*files, overwrite=asked["overwrite"] or asked["dry_run"])
    image = asked["image"] and Given.read(asked["image"])
    mask = asked["mask"] and Given.read(asked["mask"], as_mask=True)
    if image is not None:
        plan = fit_layout(image, plan)
    controls = parse_controls(asked["control"] or [], CONTROLNETS, called="ControlNet")
    adapters = parse_controls(asked["adapter"] or [], ADAPTERS, called="T2I-Adapter")
    read = {path: Given.read(path) for path in dict.fromkeys(each.picture for each in (*controls, *adapters))}
    sources = asked["concepts"] or []
    packs = dict(zip(sources, open_packs(sources, asked["base"]), strict=True))
    check_distinct(concept for pack in packs.values() for concept in pack.concepts)
    base = asked["base"] or _find_base(packs.values())
    if asked["mask"] is not None:
        refuse_inpainting(base)
    from diffusers_mixofshow.regions import Refinement

    strength = asked["strength"] or (0.8 if asked["mask"] is None else 1.0)
    drawing = Drawing(
        base=base,
        packs=packs,
        lora_scales=_repeat_number(asked["lora_scale"], len(packs)),
        plan=plan,
        seeds=range(asked["seed"], asked["seed"] + asked["count"]),
        steps=asked["steps"],
        guidance=choose_guidance(base, packs.values()) if asked["guidance"] is None else asked["guidance"],
        isolation=parse_isolation(asked["isolation_steps"], asked["isolation_scales"]) if asked["isolation"] else None,
        draft=_choose_draft(plan, asked),
        refine=Refinement() if asked["refine"] else None,
        image=image,
        mask=mask,
        strength=strength,
        controls=controls,
        adapters=adapters,
        followed=tuple(read[each.picture] for each in (*controls, *adapters)),
        control_scales=_repeat_number(asked["control_scale"], len(controls) + len(adapters)),
        device=asked["device"],
        dtype=asked["dtype"],
    )
    refuse_other_settings(drawing)
    refuse_strange_base(packs, base)
    refuse_other_models((*controls, *adapters), known_family(base) or family_of_packs(packs.values()))
    if asked["layout"] is not None:
        warn_of_changes(asked["layout"], drawing)
    return drawing


def _choose_draft(plan: Layout, asked: Mapping[str, Any]) -> Draft | None:
    """Drafts of the regions if --draft asks for them; by default, if no picture determines where things are."""
    from diffusers_mixofshow.regions import Draft

    guided = asked["image"] or asked["control"] or asked["adapter"]
    wanted = not guided if asked["draft"] is None else asked["draft"]
    return Draft() if wanted and plan.regions else None


def _repeat_number(given: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Repeat a number given once to `count` numbers, by default 1; numbers for each are kept."""
    values = list(given or [1.0])
    return tuple(values * count if len(values) == 1 else values)


def _find_base(packs: Iterable[EDLoRA]) -> str:
    """Find the base model that all packs were tuned on."""
    packs = list(packs)
    if not packs:
        raise ConfigurationError("Got neither concepts nor a base model. Give --concepts, or --base, or both.")
    return find_common_base(packs)


def _refuse_unknown(drawing: Drawing) -> None:
    """Refuse concepts in prompts that no pack holds; not with a base that may hold them, which is not loaded here."""
    from diffusers_mixofshow.pipelines.opening import has_own_concepts

    if has_own_concepts(drawing.base):
        return
    known = [concept for pack in drawing.packs.values() for concept in pack.concepts]
    for text in drawing.prompts:
        split_prompt(text, known)


def _warn_of_prompts(drawing: Drawing) -> None:
    """Warn of concepts that no prompt names and of words that the base does not know, as is done before drawing."""
    from diffusers_mixofshow.pipelines.remarks import remark_on_names, warn_of

    concepts = [concept for pack in drawing.packs.values() for concept in pack.concepts]
    warn_of(remark_on_names(drawing.prompts, concepts))
    warn_of_strange_words(drawing)


def _refuse_contradictions(plan: Layout, asked: Mapping[str, Any]) -> None:
    """Raise one error for options that exclude each other or are out of range, before anything is loaded."""
    defects = [
        *_find_region_defects(plan, asked),
        *_find_picture_defects(asked),
        *_find_number_defects(asked),
        *_find_output_defects(asked["output"]),
    ]
    defects += [
        f"a {name} of {value} pixels, expected a multiple of {GRAIN}"
        for name, value in (("width", plan.width), ("height", plan.height))
        if value is not None and value % GRAIN
    ]
    sources = asked["concepts"] or []
    if twice := sorted({source for source in sources if sources.count(source) > 1}):
        defects.append(f"--concepts {', '.join(twice)} twice")
    if defects:
        raise ConfigurationError(f"Got {'; '.join(defects)}.")


def _find_region_defects(plan: Layout, asked: Mapping[str, Any]) -> list[str]:
    defects = []
    if asked["refine"] and not plan.regions:
        defects.append("--refine without any region to redraw; give --region or --layout, too")
    if asked["draft"] and not plan.regions:
        defects.append("--draft without any region to draw alone; give --region or --layout, too")
    if asked["draft"] and asked["image"] is not None:
        defects.append("--draft and --image, which starts from a picture instead of noise")
    if asked["isolation"] and not plan.regions:
        defects.append("--isolation without any region to keep apart; give --region or --layout, too")
    details = [name for name in ("isolation_steps", "isolation_scales") if asked[name] is not None]
    if details and not asked["isolation"]:
        defects.append(f"{' and '.join(map(_spell_option, details))} without --isolation")
    return defects


def _find_picture_defects(asked: Mapping[str, Any]) -> list[str]:
    """Find what is wrong with the pictures to start from and to follow."""
    defects = []
    ways = [_spell_option(name) for name in ("image", "control", "adapter") if asked[name]]
    if len(ways) > 1:
        defects.append(f"{' and '.join(ways)} at once, expected one of them")
    for name in ("mask", "strength"):
        if asked[name] is not None and asked["image"] is None:
            defects.append(f"{_spell_option(name)} without --image")
    for name in ("image", "mask"):
        if asked[name] is not None and not asked[name].is_file():
            defects.append(f"{_spell_option(name)} {asked[name]}, which is no file")
    followed = [*(asked["control"] or []), *(asked["adapter"] or [])]
    return defects + _find_count_defects(asked, "control_scale", len(followed), "--control or --adapter")


def _find_number_defects(asked: Mapping[str, Any]) -> list[str]:
    defects = _find_count_defects(asked, "lora_scale", len(asked["concepts"] or []), "--concepts")
    if asked["guidance"] is not None and not math.isfinite(asked["guidance"]):
        defects.append(f"--guidance {asked['guidance']}, expected a number such as 7.5")
    if asked["strength"] is None:
        return defects
    if not 0 < asked["strength"] <= 1:
        defects.append(f"--strength {asked['strength']}, expected a number above 0 and up to 1")
    elif int(asked["strength"] * asked["steps"]) < 1:
        defects.append(f"--strength {asked['strength']} of {asked['steps']} steps, which is less than one step")
    return defects


def _find_count_defects(asked: Mapping[str, Any], name: str, count: int, of: str) -> list[str]:
    """Find what is wrong with an option that is given once for all of something, or once for each."""
    given = asked[name] or []
    defects = [
        f"{_spell_option(name)} {value}, expected a number such as 0.8" for value in given if not math.isfinite(value)
    ]
    if given and not count:
        defects.append(f"{_spell_option(name)} without {of}")
    elif len(given) not in (0, 1, count):
        defects.append(
            f"{_spell_option(name)} {len(given)} times for {count} {of}, expected one for all or one for each"
        )
    return defects


def _find_output_defects(output: Path) -> list[str]:
    if output.suffix.lower() not in FORMATS:
        return [f"--output {output}, expected a file that ends in {', '.join(FORMATS)}"]
    return [f"--output {output} is a folder, expected a file"] if output.is_dir() else []


def _spell_option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _build_layout(asked: Mapping[str, Any]) -> Layout:
    """The layout of the file; options replace its prompts and size, and add regions."""
    from diffusers_mixofshow.regions import Layout
    from diffusers_mixofshow.regions.layout import OF_PICTURE
    from diffusers_mixofshow.sampling.provenance import read_layout

    plan = Layout() if asked["layout"] is None else read_layout(asked["layout"])
    given = {name: getattr(plan, name) if asked[name] is None else asked[name] for name in OF_PICTURE}
    if given["prompt"] is None:
        raise ConfigurationError("Got no prompt. Give --prompt, or --layout with a file that has one.")
    return Layout((*plan.regions, *parse_regions(asked["region"] or [])), **given)


def number_files(path: Path, count: int) -> list[Path]:
    """One file name for each picture: ``x.png``, or ``x-0.png``, ``x-1.png``, ..."""
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{index}") for index in range(count)]
