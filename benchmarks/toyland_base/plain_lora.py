"""Tune plain LoRAs of the second base: ``python -m benchmarks.toyland_base.plain_lora --output DIR --names bobo rex``.

As diffusers' ``train_dreambooth_lora_sd3.py`` does it: PEFT's LoRA on the attention of both streams, the text encoders
left alone, noise levels from a logit-normal distribution, AdamW at a constant rate. Rate, steps and batch are those of
a small model. A LoRA answers to its name before the class word, such as ``bobo critter``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from rich.progress import track

from benchmarks.toyland_base.transformer import TEXT_TOKENS, FlowObjective
from diffusers_mixofshow.base_models import TOYLAND_SD3
from diffusers_mixofshow.conditioning.tokenize import tokenize_plain
from diffusers_mixofshow.sampling.loading import load_base
from diffusers_mixofshow.toyland.concepts import CONCEPTS, PLACEHOLDER, ToyConcept, photos
from diffusers_mixofshow.toyland.reader import to_pixels


NAMES = ("bobo", "kiki", "momo", "zuzu", "lulu", "tiki", "rex", "ming")
"""Six critters, a dog and a vase, of looks that the base was trained on."""

ADAPTED = tuple(
    f"attn.{name}"
    for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
)
"""The layers of diffusers' recipe."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a LoRA is tuned.

    Args:
        steps: Steps of the optimiser.
        batch_size: Photos a step.
        rank: Rank of every update; alpha is the same.
        learning_rate: Constant rate.
        seed: Seed of photos, weights, noise and order.
    """

    steps: int = 400
    batch_size: int = 8
    rank: int = 4
    learning_rate: float = 1e-3
    seed: int = 0


def name_with_class(concept: ToyConcept) -> str:
    """The words that a concept's LoRA answers to."""
    return f"{concept.name} {concept.class_word}"


def tune(pipeline: StableDiffusion3Pipeline, concept: ToyConcept, file: Path, tuning: Tuning) -> None:
    """Tune one LoRA and write it by the pipeline's own `save_lora_weights`; the pipeline is left as it is."""
    torch.manual_seed(tuning.seed)
    taken = photos(concept, seed=tuning.seed)
    with torch.no_grad():
        latents = pipeline.vae.encode(to_pixels([photo.image for photo in taken])).latent_dist.mode()
    captions = [photo.caption.replace(PLACEHOLDER, name_with_class(concept)) for photo in taken]
    token_ids = tokenize_plain(captions, pipeline.tokenizer)[:, :TEXT_TOKENS]
    model = copy.deepcopy(pipeline.transformer).requires_grad_(False)
    settings = {"r": tuning.rank, "lora_alpha": tuning.rank, "init_lora_weights": "gaussian"}
    model.add_adapter(LoraConfig(**settings, target_modules=list(ADAPTED)))
    objective = FlowObjective(model, (pipeline.text_encoder, pipeline.text_encoder_2))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=tuning.learning_rate, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(tuning.seed)
    for _ in track(range(tuning.steps), description=concept.name):
        chosen = torch.randint(len(taken), (tuning.batch_size,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        levels = torch.randn(tuning.batch_size, generator=generator).sigmoid()
        objective((clean, noise, levels, token_ids[chosen])).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    layers = get_peft_model_state_dict(model)
    StableDiffusion3Pipeline.save_lora_weights(file.parent, transformer_lora_layers=layers, weight_name=file.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune the LoRAs that the output folder does not hold yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toyland_base.plain_lora", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for NAME.safetensors")
    parser.add_argument("--names", nargs="+", choices=tuple(CONCEPTS), default=NAMES, metavar="NAME")
    parser.add_argument("--base", default=TOYLAND_SD3, help="folder of another base of the class")
    for setting, usual in vars(Tuning()).items():
        parser.add_argument("--" + setting.replace("_", "-"), type=type(usual), default=usual, help="see Tuning")
    options = vars(parser.parse_args(arguments))
    tuning = Tuning(**{name: options[name] for name in vars(Tuning())})
    pipeline = load_base(options["base"], "cpu", "float32", concepts=False)
    options["output"].mkdir(parents=True, exist_ok=True)
    for name in options["names"]:
        file = options["output"] / f"{name}.safetensors"
        if not file.exists():
            tune(pipeline, CONCEPTS[name], file, tuning)


if __name__ == "__main__":
    main()
