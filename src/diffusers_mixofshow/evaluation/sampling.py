"""Sample the pictures to be measured, with the same prompts and seeds for every method that is compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from diffusers_mixofshow.concepts import SLOT
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowWarning
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.progress import hide_bars
from diffusers_mixofshow.regions import Region


ON_PICTURES = Callable[[int], None]
"""Called with the number of newly finished pictures."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are sampled.

    Args:
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        batch_size: Pictures sampled together.
        first_seed: Seed of the first picture; each next one's is one higher.
        height: Height in pixels; None: the model's own.
        width: Width in pixels; None: the model's own.
    """

    steps: int = 20
    guidance_scale: float = 7.5
    batch_size: int = 6
    first_seed: int = 1
    height: int | None = None
    width: int | None = None


def fill_templates(templates: Sequence[str], subject: str, count: int) -> list[str]:
    """Write prompts about one subject, taking the templates in turn.

    Args:
        templates: Prompts with ``<TOK>``.
        subject: A placeholder such as ``<potter>``, or a class word.
        count: Number of prompts.
    """
    nameless = [template for template in templates if SLOT not in template]
    if nameless or not templates:
        raise ConfigurationError(f"Templates without {SLOT}: {nameless or 'none given'}. Name the subject so.")
    return [templates[index % len(templates)].replace(SLOT, subject) for index in range(count)]


@contextmanager
def _allow_unnamed_concepts() -> Iterator[None]:
    """Silence warnings of loaded concepts that no prompt names: what a pack does to other prompts is measured, too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(no prompt names|the prompt says) ", MixOfShowWarning)
        yield


def sample_pictures(
    pipe: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    regions: Sequence[Region] | None = None,
    first: int = 0,
    advance: ON_PICTURES = lambda pictures: None,
    **arguments: Any,
) -> list[Image.Image]:
    """Sample one picture per prompt; picture k has the seed ``first_seed + first + k`` for any batch size.

    Args:
        pipe: A Mix-of-Show pipeline with the concepts loaded; of a family that has none, the pipeline of diffusers.
        prompts: One prompt per picture.
        sampling: Steps, guidance, size, batch size and first seed.
        regions: Regions of every picture.
        first: Number of the first picture, for its seed.
        advance: Called after every batch with its number of pictures.
        arguments: Further arguments of the pipeline, such as ``isolation``, or ``image`` for a T2I-Adapter.
    """
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), sampling.batch_size):
        batch = list(prompts[start : start + sampling.batch_size])
        seeds = range(sampling.first_seed + first + start, sampling.first_seed + first + start + len(batch))
        with hide_bars(pipe), _allow_unnamed_concepts():
            pictures += pipe(
                prompt=batch,
                num_inference_steps=sampling.steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                height=sampling.height,
                width=sampling.width,
                **_arguments_of_family(pipe, len(batch), sampling.guidance_scale, regions),
                **arguments,
            ).images
        advance(len(batch))
    return pictures


def _arguments_of_family(
    pipe: Any, count: int, guidance_scale: float, regions: Sequence[Region] | None
) -> dict[str, object]:
    """Arguments that not every family's pipeline takes, or takes under this name."""
    family = family_of(pipe.components)
    negative = {"negative_prompt": [""] * count} if family.takes_negative_prompt else {}
    own = {"regions": list(regions) if regions else None} if family.concept_pipeline else {}
    return {family.guidance_argument: guidance_scale, **negative, **own}
