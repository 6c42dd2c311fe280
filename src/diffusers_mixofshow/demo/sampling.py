"""Stage four of the demo: sample pictures of every concept alone with every method, and of three together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffusers_mixofshow import toyland
from diffusers_mixofshow.demo.settings import DemoConcept, DemoSettings
from diffusers_mixofshow.evaluation.prompts import (
    HELD_OUT_PROMPTS,
    TOGETHER_PLACES,
    column_boxes,
    name_with_class,
    prompt_together,
)
from diffusers_mixofshow.evaluation.sampling import ON_PICTURES, Sampling, fill_templates, sample_pictures
from diffusers_mixofshow.pipelines import MixOfShowAdapterPipeline
from diffusers_mixofshow.regions import Draft, Isolation, Refinement, Region


METHODS = {
    "class word": "The base, prompted with the class word",
    "single": "Its own ED-LoRA, alone",
    "average": "Weight average of all ED-LoRAs",
    "fused": "Gradient fusion of all ED-LoRAs",
}
"""Method of sampling a concept to its description, in the order of the page."""

WIDTH, HEIGHT = 96, 64
"""Size of pictures with three concepts."""

_TOGETHER = 3
_LAYOUT_STRENGTH = 0.8
_TOGETHER_SEED = 5000


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """All sampled pictures.

    Args:
        alone: Method to concept name to pictures.
        regional: Pictures of several concepts in isolated regions, drafted and refined.
        unguided: Pictures of the same prompts and seeds without regions.
        order: For each picture of `regional` and `unguided`, the concepts from left to right.
        layouts: For each of these, the T2I-Adapter's condition image.
    """

    alone: dict[str, dict[str, list[Image.Image]]]
    regional: list[Image.Image]
    unguided: list[Image.Image]
    order: list[tuple[str, ...]]
    layouts: list[Image.Image]


def picture_count(settings: DemoSettings) -> int:
    """Number of pictures that `sample_all` samples."""
    return len(METHODS) * len(settings.concepts) * settings.pictures + 2 * settings.together


def sample_all(
    pipe: Any,
    concepts: Sequence[DemoConcept],
    packs: dict[str, Path],
    settings: DemoSettings,
    advance: ON_PICTURES,
) -> Pictures:
    """Sample every concept alone with every method, and several together.

    Args:
        pipe: The base as a Mix-of-Show pipeline without a loaded concept; afterwards none is loaded either.
        concepts: The demo's concepts.
        packs: ``single/NAME``, ``average`` and ``fused`` to folders of ED-LoRAs.
        settings: The demo's settings.
        advance: Called with the number of newly finished pictures.
    """
    alone = {method: _sample_alone(pipe, method, concepts, packs, settings, advance) for method in METHODS}
    class_words = {concept.name: concept.class_word for concept in concepts}
    order = [rotate_concepts(concepts)[index % _TOGETHER] for index in range(settings.together)]
    layouts = [draw_layout([class_words[name] for name in names]) for names in order]
    pipe.load_edlora(packs["fused"])
    try:
        placing = MixOfShowAdapterPipeline.from_pipe(pipe, adapter=toyland.load_layout_adapter())
        regional = _sample_together(placing, order, class_words, settings, advance, layouts, with_regions=True)
        unguided = _sample_together(placing, order, class_words, settings, advance, layouts, with_regions=False)
    finally:
        pipe.unload_edlora()
    return Pictures(alone=alone, regional=regional, unguided=unguided, order=order, layouts=layouts)


def prompts_alone(method: str, concept: DemoConcept, settings: DemoSettings) -> list[str]:
    """The prompts of a concept's pictures with a method."""
    subject = concept.class_word if method == "class word" else concept.placeholder
    return fill_templates(HELD_OUT_PROMPTS, subject, settings.pictures)


def prompts_together(order: Sequence[tuple[str, ...]], class_words: Mapping[str, str]) -> list[str]:
    """The global prompts of pictures of several concepts, which name these from left to right."""
    return [
        prompt_together([name_with_class(name, class_words[name]) for name in names], _place(index))
        for index, names in enumerate(order)
    ]


def first_seeds(settings: DemoSettings) -> tuple[int, int]:
    """Seeds of the first picture of a concept alone, and of the first of several; each next one's is one higher."""
    return 1000 * (settings.seed + 1), _TOGETHER_SEED + 1000 * settings.seed


def _place(index: int) -> str:
    return TOGETHER_PLACES[index % len(TOGETHER_PLACES)]


def draw_layout(class_words: Sequence[str]) -> Image.Image:
    """Draw the condition image of things side by side in equal columns."""
    width = WIDTH if len(class_words) == _TOGETHER else HEIGHT
    places = toyland.stand_in(column_boxes(len(class_words)), class_words, width, HEIGHT)
    return toyland.draw_places(places, width, HEIGHT)


def rotate_concepts(concepts: Sequence[DemoConcept]) -> list[tuple[str, ...]]:
    """Orders of the concepts in one picture, in which each concept stands once at every place."""
    names = [concept.name for concept in concepts[:_TOGETHER]]
    return [tuple(names[shift:] + names[:shift]) for shift in range(_TOGETHER)]


def _sample_alone(
    pipe: Any,
    method: str,
    concepts: Sequence[DemoConcept],
    packs: dict[str, Path],
    settings: DemoSettings,
    advance: ON_PICTURES,
) -> dict[str, list[Image.Image]]:
    sampling = Sampling(
        steps=settings.steps, guidance_scale=settings.guidance_scale, first_seed=first_seeds(settings)[0]
    )
    pictures = {}
    for concept in concepts:
        if method != "class word":
            pipe.load_edlora(packs[f"single/{concept.name}" if method == "single" else method])
        try:
            prompts = prompts_alone(method, concept, settings)
            pictures[concept.name] = sample_pictures(pipe, prompts, sampling, advance=advance)
        finally:
            pipe.unload_edlora()
    return pictures


def _sample_together(
    pipe: Any,
    order: Sequence[tuple[str, ...]],
    class_words: Mapping[str, str],
    settings: DemoSettings,
    advance: ON_PICTURES,
    layouts: Sequence[Image.Image],
    *,
    with_regions: bool,
) -> list[Image.Image]:
    sampling = Sampling(
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        first_seed=first_seeds(settings)[1],
        height=layouts[0].height,
        width=layouts[0].width,
    )
    pictures = []
    prompts = prompts_together(order, class_words)
    for index, (names, layout) in enumerate(zip(order, layouts, strict=True)):
        separation: dict[str, Any] = {}
        if with_regions:
            boxes = zip(names, column_boxes(len(names)), strict=True)
            separation["regions"] = [Region(f"a <{name}>, {_place(index)}", box=box) for name, box in boxes]
            separation |= {"isolation": Isolation(), "draft": Draft(), "refine": Refinement()}
        pictures += sample_pictures(
            pipe,
            [prompts[index]],
            sampling,
            first=index,
            advance=advance,
            image=layout,
            adapter_conditioning_scale=_LAYOUT_STRENGTH,
            **separation,
        )
    return pictures
