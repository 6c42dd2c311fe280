"""Validation sheets: pictures during training, of the same prompt and seeds at several scales of the LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from diffusers_mixofshow.base_models import guidance_of, public_name
from diffusers_mixofshow.concepts import SLOT
from diffusers_mixofshow.conditioning.encode import Encoded
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.lora import TrainableLoRA
from diffusers_mixofshow.notes import format_infotext, make_sheet_note, sampler_name
from diffusers_mixofshow.training.base import convert_pipeline, stock_class
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.reader import TextReader, tokenize_for


if TYPE_CHECKING:
    from diffusers_mixofshow.training.trained import Trained

SCALES = (0.0, 0.7, 1.0)
"""Scales of the LoRA on a sheet, one row each (reference); at 0 only the embeddings act."""
_STEPS = 20


def make_plain_pipeline(pipeline: Any) -> Any:
    """Make diffusers' own pipeline of the same models, with DPM-Solver and without a progress bar."""
    scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    made = convert_pipeline(pipeline, stock_class(family_of(pipeline.components)), scheduler=scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def drawing_settings(pipeline: Any, config: TrainingConfig) -> dict[str, Any]:
    """Arguments of the pipeline for pictures drawn during training: size, steps and guidance."""
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
        pipeline: The base model, with the LoRA and the layer-wise processors.
        trained: The embeddings and the LoRA at this step.
        config: Prompt, number of pictures, resolution and seed.

    Returns:
        Label to the pictures of a row, for each of `SCALES`; a single row for a method without LoRA.
    """
    concept, stock = config.concept_to_learn, make_plain_pipeline(pipeline)
    reader = TextReader(pipeline.components, trained.embeddings)
    prompt = config.validation_prompt.replace(SLOT, concept.placeholder)
    texts, rows = tokenize_for(pipeline, [prompt, ""], concept), {}
    for scale in SCALES if trained.lora is not None else SCALES[-1:]:
        with scale_lora(trained.lora, scale):
            encoded = reader(texts)
            rows[f"LoRA {scale:g}"] = [
                picture
                for seeds in _batch_seeds(config)
                for picture in stock(
                    **_prompt_arguments("", encoded, 0, len(seeds)),
                    **_prompt_arguments("negative_", encoded, 1, len(seeds)),
                    **drawing_settings(pipeline, config),
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                ).images
            ]
    return rows


def describe_sheet(
    pipeline: Any, config: TrainingConfig, prompt: str, labels: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """Describe how a sheet was drawn: a note for this package, and A1111's text for other programs.

    Args:
        pipeline: As for `draw_rows`.
        config: As for `draw_rows`.
        prompt: The validation prompt with the concept's placeholder.
        labels: Labels of the rows.
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
    """Multiply the LoRA's scale inside the block; None has no effect."""
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


def _batch_seeds(config: TrainingConfig) -> list[list[int]]:
    """Seeds of a row in batches of the training's batch size, which is known to fit into memory."""
    seeds = [config.seed + number for number in range(config.num_validation_images)]
    return [seeds[start : start + config.train_batch_size] for start in range(0, len(seeds), config.train_batch_size)]


def _prompt_arguments(kind: str, encoded: Encoded, row: int, pictures: int) -> dict[str, torch.Tensor]:
    """Arguments of a pipeline that pass one encoded text for a number of pictures."""
    chosen = encoded.select([row] * pictures)
    pooled = {} if chosen.pooled is None else {f"{kind}pooled_prompt_embeds": chosen.pooled}
    return {f"{kind}prompt_embeds": chosen.states, **pooled}
