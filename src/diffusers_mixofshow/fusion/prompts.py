"""Prompts that a concept is recorded with. Contexts that they never show are not protected by fusion.

None of them is an evaluation prompt of the paper (figure 8), so that its protocol tests prompts not fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from diffusers_mixofshow.concepts import KINDS, SLOT, Concept
from diffusers_mixofshow.errors import FusionError


PromptSet = Sequence[str] | Mapping[str, Sequence[str]]
"""Templates for every concept, or templates by kind of concept."""

_ANYTHING = (
    "a photo of a <TOK>",
    "<TOK>",
    "a charcoal drawing of a <TOK> on white paper",
    "a colourful comic book page showing a <TOK>",
)

RECORDING_PROMPTS: dict[str, tuple[str, ...]] = {
    "character": (
        *_ANYTHING,
        "a portrait of a <TOK> in a library, warm light",
        "a <TOK> standing in a garden with a castle behind, full body",
        "a <TOK> riding a bicycle through a city at dusk",
        "a laughing <TOK> in a raincoat, holding a cup",
    ),
    "pet": (
        *_ANYTHING,
        "a <TOK> sleeping on a sofa in a living room",
        "a <TOK> on a mountain meadow, looking at the camera",
        "a happy <TOK> beside a river, full body",
        "a <TOK> wearing a scarf in a busy market",
    ),
    "object": (
        *_ANYTHING,
        "a <TOK> in a living room, soft daylight",
        "a <TOK> on a wooden floor beside a window",
        "a <TOK> on a lawn with trees behind",
        "a man carrying a small blue <TOK>",
    ),
    "scene": (
        *_ANYTHING,
        "a <TOK> in the morning fog",
        "a wide view of a <TOK> under a cloudy sky",
        "a man walking through a <TOK>",
        "a car in front of a <TOK> at sunset",
    ),
}
"""Default templates by kind: places, styles, actions and properties."""


PRIOR_PROMPTS = (
    "",
    "a photo",
    "a portrait of a person",
    "a street in a city",
    "a landscape with trees and a river",
    "a living room with furniture",
    "an animal in the grass",
    "a painting of a village",
)
"""Captions without any concept, for the prior that keeps the base as it is."""


def prior_prompts(concepts: Iterable[Concept], prompts: Sequence[str] | None = None) -> tuple[str, ...]:
    """Prompts to record the base with: the concepts' class words, and captions, by default `PRIOR_PROMPTS`."""
    prompts = (prompts,) if isinstance(prompts, str) else prompts
    class_words = dict.fromkeys(f"a photo of a {concept.class_word}" for concept in concepts)
    return (*class_words, *(PRIOR_PROMPTS if prompts is None else prompts))


def prompts_of_trigger(words: Iterable[str]) -> tuple[str, ...]:
    """Default recording prompts of a plain LoRA, one set for each of its trigger words, such as ``sks dog``."""
    return tuple(template.replace(SLOT, word) for word in words for template in _ANYTHING)


def recording_prompts(concept: Concept, prompts: PromptSet | None = None) -> tuple[str, ...]:
    """Fill one concept into the templates of its recording prompts.

    Args:
        concept: Its placeholder replaces ``<TOK>``.
        prompts: Templates for all concepts, or by kind; None takes `RECORDING_PROMPTS`.

    Raises:
        FusionError: If there is no template for the concept's kind, or one does not name the concept.
    """
    templates = RECORDING_PROMPTS if prompts is None else prompts
    if isinstance(templates, Mapping):
        _check_kinds(templates, concept.kind)
        templates = templates[concept.kind]
    if isinstance(templates, str):
        templates = [templates]
    nameless = [template for template in templates if SLOT not in template]
    if nameless or not templates:
        raise FusionError(
            f"Recording prompts without the concept: {nameless or 'none given'}. "
            f"Give at least one, and write {SLOT} where the concept's name goes, as in 'a photo of a <TOK>'."
        )
    return tuple(template.replace(SLOT, concept.placeholder) for template in templates)


def _check_kinds(templates: Mapping[str, Sequence[str]], wanted: str) -> None:
    strange = sorted(set(templates) - set(KINDS))
    if strange or wanted not in templates:
        raise FusionError(
            f"Recording prompts by kind: got {', '.join(map(repr, templates)) or 'none'}, need {wanted!r}. "
            f"The kinds are {', '.join(KINDS)}."
        )
