"""Pictures while a concept is learnt: the same prompts and seeds at several strengths of the LoRA, as one sheet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from diffusers_mixofshow.base_models import guidance_of, public_name
from diffusers_mixofshow.conditioning.encode import Encoded
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.lora import TrainableLoRA
from diffusers_mixofshow.notes import format_infotext, make_sheet_note, sampler_name
from diffusers_mixofshow.training.base import stock_class, with_same_models
from diffusers_mixofshow.training.captions import CAPTION_SLOT
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.reader import TextReader, tokenize_for


if TYPE_CHECKING:
    from diffusers_mixofshow.training.trained import Trained

SCALES = (0.0, 0.7, 1.0)
"""Strengths of the LoRA on a sheet, one row each; at 0 the embeddings alone draw (reference)."""
_STEPS = 20


def plain_pipeline(pipeline: Any) -> Any:
    """A stock pipeline of the same models with DPM-Solver, without a progress bar; the given one stays as it is."""
    scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    made = with_same_models(pipeline, stock_class(family_of(pipeline.components)), scheduler=scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def drawing_settings(pipeline: Any, config: TrainingConfig) -> dict[str, Any]:
    """Size, steps and guidance of pictures that are drawn for a training, as arguments of the pipeline."""
    return {
        "height": config.resolution,
        "width": config.resolution,
        "num_inference_steps": _STEPS,
        "guidance_scale": guidance_of(pipeline.components),
    }


@torch.no_grad()
def draw_rows(pipeline: Any, trained: Trained, config: TrainingConfig) -> dict[str, list[Image.Image]]:
    """Sample the validation prompt at every scale, each row with the same seeds.

    Args:
        pipeline: Borrowed, with the LoRA and the layer-wise processors inside.
        trained: What was learnt so far.
        config: Prompt, number of pictures, resolution and seed.

    Returns:
        Label to the row of each of `SCALES`; a single row for a method without LoRA.
    """
    concept, stock = config.concept_to_learn, plain_pipeline(pipeline)
    reader = TextReader(pipeline.components, trained.embeddings)
    prompt = config.validation_prompt.replace(CAPTION_SLOT, concept.placeholder)
    texts, rows = tokenize_for(pipeline, [prompt, ""], concept), {}
    for scale in SCALES if trained.lora is not None else SCALES[-1:]:
        with scale_lora(trained.lora, scale):
            encoded = reader(texts)
            rows[f"LoRA {scale:g}"] = [
                picture
                for seeds in _parts(config)
                for picture in stock(
                    **_embeds("", encoded, 0, len(seeds)),
                    **_embeds("negative_", encoded, 1, len(seeds)),
                    **drawing_settings(pipeline, config),
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                ).images
            ]
    return rows


def describe_sheet(
    pipeline: Any, config: TrainingConfig, prompt: str, labels: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """What a sheet tells of how it was drawn: exactly, and as other programs read it.

    Args:
        pipeline: As for `draw_rows`.
        config: As for `draw_rows`.
        prompt: The validation prompt, the concept in its place.
        labels: Of the rows.
    """
    drawn, model = drawing_settings(pipeline, config), config.pretrained_model_name_or_path
    row = [(prompt, config.seed + number) for number in range(config.num_validation_images)]
    note = make_sheet_note(
        dict.fromkeys(labels, row), base_model=model, steps=_STEPS, guidance=drawn["guidance_scale"]
    )
    settings = {
        "Steps": _STEPS,
        "Sampler": sampler_name(DPMSolverMultistepScheduler),
        "CFG scale": f"{drawn['guidance_scale']:g}",
        "Seed": config.seed,
        "Size": f"{drawn['width']}x{drawn['height']}",
        "Model": public_name(model).rpartition("/")[2],
    }
    return note, format_infotext(prompt, "", settings)


@contextmanager
def scale_lora(lora: TrainableLoRA | None, scale: float) -> Iterator[None]:
    """Let the updates act at a part of their strength inside the block."""
    layers = [] if lora is None else list(lora.layers.values())
    name = "" if lora is None else lora.adapter_name
    before = [layer.scaling[name] for layer in layers]
    try:
        for layer, full in zip(layers, before, strict=True):
            layer.scaling[name] = scale * full
        yield
    finally:
        for layer, full in zip(layers, before, strict=True):
            layer.scaling[name] = full


def _parts(config: TrainingConfig) -> list[list[int]]:
    """Seeds of a row, as many together as a training batch has pictures, for which there is memory."""
    seeds = [config.seed + number for number in range(config.num_validation_images)]
    return [seeds[start : start + config.train_batch_size] for start in range(0, len(seeds), config.train_batch_size)]


def _embeds(kind: str, encoded: Encoded, row: int, pictures: int) -> dict[str, torch.Tensor]:
    """One of the texts as arguments of a pipeline, for a number of pictures."""
    chosen = encoded.select([row] * pictures)
    pooled = {} if chosen.pooled is None else {f"{kind}pooled_prompt_embeds": chosen.pooled}
    return {f"{kind}prompt_embeds": chosen.states, **pooled}
