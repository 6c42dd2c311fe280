"""Check a call's regions for errors, and remark on what has no effect in the call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusers_mixofshow.concepts import Concept, mentions_concept
from diffusers_mixofshow.conditioning.canvas import Canvas, RegionPlan
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import RegionError, list_first, warn
from diffusers_mixofshow.lora import find_inactive
from diffusers_mixofshow.pipelines.prompts import count_prompts
from diffusers_mixofshow.regions import Layout, Region
from diffusers_mixofshow.regions.weights import resolves


# A call's argument `regions`: one list for all prompts, or a list with the regions of each prompt.
Regions = Sequence[Region] | Layout | Sequence[Sequence[Region] | Layout | None]

_MOST_NAMED = 4
"""How many concepts a remark names."""


def sort_regions(
    regions: Regions | None, arguments: Mapping[str, Any], size_factor: int
) -> tuple[tuple[Region, ...], ...]:
    """Sort a call's regions by prompt, and check them against the call's other arguments.

    Args:
        regions: The call's argument.
        arguments: The call's other arguments.
        size_factor: Width and height of a latent cell in pixels.

    Returns:
        One entry with the regions of all prompts, or one for each prompt. Empty if there is no region.

    Raises:
        RegionError: Names every defect at once.
    """
    if regions is None:
        return ()
    if not isinstance(regions, Sequence | Layout):
        raise RegionError(f"`regions` is a {type(regions).__name__}; expected a list of Region, or a Layout.")
    nested = not isinstance(regions, Layout) and any(isinstance(entry, list | tuple | Layout) for entry in regions)
    lists = [_as_tuple(entry) for entry in regions] if nested else [tuple(regions)]
    found = [region for own in lists for region in own]
    if not found:
        return ()
    defects = _list_wrong_entries(found)
    prompts = count_prompts(arguments.get("prompt"), arguments.get("prompt_embeds"))
    if nested and len(lists) != prompts:
        defects.append(f"{len(lists)} lists of regions for {prompts} prompts; give one for each, or one for all")
    defects += [
        f"{name} {arguments[name]} is not divisible by {size_factor}, the pixels of a latent cell"
        for name in ("height", "width")
        if isinstance(arguments.get(name), int) and arguments[name] % size_factor
    ]
    own_guidance = [region for region in found if isinstance(region, Region) and region.guidance_scale is not None]
    guidance = arguments.get("guidance_scale")  # left out: the pipeline's default, which is above 1
    if own_guidance and guidance is not None and guidance <= 1:
        defects.append(
            f"{_name_regions(own_guidance)} with a guidance_scale of their own in a call without guidance; give the "
            "call a guidance_scale above 1"
        )
    if defects:
        raise RegionError("`regions`: " + "; ".join(defects) + ".")
    return tuple(lists)


def remark_on_texts(regions: Iterable[Region], prompts: Iterable[str], concepts: Sequence[Concept]) -> list[str]:
    """Remark on regions that say what a loaded concept is, but not its name, and on a name that holds nowhere.

    Args:
        regions: The call's regions.
        prompts: Its global prompts.
        concepts: The loaded concepts.
    """
    regions = list(regions)
    if not regions or not concepts:
        return []
    remarks = []
    without = [region for region in regions if not mentions_concept(region.prompt, concepts)]
    for concept in concepts:
        word = re.compile(rf"\b{re.escape(concept.class_word)}\b", re.IGNORECASE)
        if alike := [region for region in without if word.search(region.prompt)]:
            remarks.append(
                f"{_name_regions(alike)} without {concept.placeholder}, which is a {concept.class_word}: drawn as any "
                f"{concept.class_word}"
            )
    if len(without) == len(regions) and any(mentions_concept(prompt, concepts) for prompt in prompts):
        remarks.append("only the global prompt names a concept, and it does not hold inside the regions")
    return remarks


def remark_on_names(prompts: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """Remark on concepts whose name a prompt writes as a plain word, and on prompts of which none names a concept.

    Args:
        prompts: All prompts of a call, those of its regions included; empty where it is given embeddings.
        concepts: The loaded concepts.
    """
    plain = [remark for concept in concepts if (remark := _remark_on_plain_word(prompts, concept))]
    if plain or not concepts or not prompts or any(mentions_concept(prompt, concepts) for prompt in prompts):
        return plain
    names = [concept.placeholder for concept in concepts]
    return [f"no prompt names {list_first(names, _MOST_NAMED)}, so that only weight updates act; write 'a {names[0]}'"]


def _remark_on_plain_word(prompts: Sequence[str], concept: Concept) -> str:
    """Remark on a concept that no prompt names, while one has its name without the brackets; else empty."""
    if any(mentions_concept(prompt, [concept]) for prompt in prompts):
        return ""
    words = "|".join(re.escape(name.strip("<>")) for name in (concept.placeholder, *concept.tokens))
    found = re.search(rf"(?<![\w<])(?:{words})(?![\w>])", "\n".join(prompts), re.IGNORECASE)
    return f"the prompt says {found[0]}; did you mean {concept.placeholder}?" if found else ""


def remark_on_idle_updates(
    components: Mapping[str, object], edloras: Mapping[str, EDLoRA], texts: Sequence[str]
) -> list[str]:
    """Remark on concepts that a text names while their weight updates do not act."""
    remarks = []
    for name, edlora in edloras.items():
        if any(mentions_concept(text, edlora.concepts) for text in texts):
            parts: dict[str, list[str]] = {}
            for component, reason in find_inactive(components, edlora, name).items():
                parts.setdefault(reason, []).append(component)
            concepts = ", ".join(concept.placeholder for concept in edlora.concepts)
            remarks += [
                f"{concepts} without its weight updates in {' and '.join(places)}: adapter {name!r} {reason}"
                for reason, places in parts.items()
            ]
    return remarks


def remark_on_cropped_regions(regions: Sequence[Region]) -> list[str]:
    """Remark on regions that lie outside of the crop that is drawn."""
    return [f"{_name_regions(regions)} outside of what padding_mask_crop draws, without an effect"] if regions else []


def remark_on_layout(canvas: Canvas) -> list[str]:
    """After a call, remark on regions that had no cell or no step, and on a global prompt that had no place."""
    if canvas.size is None:
        return []
    regions = canvas.regions()
    remarks = []
    lost = [region for region in regions if not resolves(region, *canvas.size)]
    if lost:
        size = f"{canvas.size[0]} x {canvas.size[1]}"
        remarks.append(f"{_name_regions(lost)} smaller than a cell of the largest feature map ({size})")
    steps = canvas.steps
    if steps is not None:
        never = [region for region in regions if not any(region.holds(step, steps) for step in range(steps))]
        if never:
            remarks.append(
                f"{_name_regions(never)} with start and end within one of the {steps} steps, so that it never holds"
            )
    if not any(_has_global_part(plan, canvas.size) for plan in canvas.plans):
        remarks.append("the regions cover the whole picture, so that the global prompt has no effect")
    return remarks


def _has_global_part(plan: RegionPlan, size: tuple[int, int]) -> bool:
    """Whether the global prompt holds somewhere at some step."""
    return not plan.regions or plan.changes or bool(plan.weights(*size)[0].any())


def remark_on_control(regions: Iterable[Region], scale: object, has_control: bool) -> list[str]:
    """Remark on ControlNets and adapters with a strength of 0, and on regions with a strength for none of either.

    Args:
        regions: The regions.
        scale: Strength of the ControlNets or adapters, one or several.
        has_control: Whether the pipeline has any.
    """
    if not has_control:
        scaled = [region for region in regions if region.control_scale != 1]
        return [f"{_name_regions(scaled)} with a control_scale, but the pipeline has no control"] if scaled else []
    scales = list(scale) if isinstance(scale, list | tuple) else [scale]
    if any(value == 0 for value in scales):
        return ["a ControlNet or adapter with a strength of 0 has no effect"]
    return []


def warn_of(remarks: Sequence[str]) -> None:
    """Warn of all remarks in one warning; none if there are none."""
    if remarks:
        text = "; ".join(remarks)
        warn(text if text.endswith("?") else f"{text}.")


def _as_tuple(entry: object) -> tuple[Any, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, list | tuple | Layout) else (entry,)


def _list_wrong_entries(found: Iterable[object]) -> list[str]:
    wrong = [type(entry).__name__ for entry in found if not isinstance(entry, Region)]
    return [f"{', '.join(wrong)} in the list; expected Region(prompt, box=...) or mask=..."] if wrong else []


def _name_regions(regions: Sequence[Region]) -> str:
    prompts = ", ".join(repr(region.prompt) for region in regions)
    return f"region {prompts}" if len(regions) == 1 else f"regions {prompts}"
