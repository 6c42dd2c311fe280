"""Tune plain LoRAs of the second base: ``python -m benchmarks.toyland_base.plain_lora --output DIR --names bobo rex``.

As diffusers' ``train_dreambooth_lora_sd3.py`` does it: PEFT's LoRA on the attention of both streams, the text encoders
left alone, noise levels from a logit-normal distribution, AdamW at a constant rate. Rate, steps and batch are those of
a small model. A LoRA answers to its name before the class word, such as ``bobo critter``. With pictures of other
things of its class in every batch, which DreamBooth calls prior preservation, it answers to that name alone; without,
the class word is enough.
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
from PIL import Image
from rich.progress import track

from diffusers_mixofshow.base_models import TOYLAND_SD3
from diffusers_mixofshow.concepts import SLOT
from diffusers_mixofshow.conditioning.tokenize import tokenize_plain
from diffusers_mixofshow.sampling.loading import load_base
from diffusers_mixofshow.toyland.concepts import CONCEPTS, ToyConcept, photos
from diffusers_mixofshow.toyland.reader import to_pixels
from diffusers_mixofshow.toyland.scenes import caption, random_scene
from diffusers_mixofshow.toyland.world import draw

from .instances import PLAIN_LORAS, name_before_class
from .transformer import TEXT_TOKENS, FlowObjective


ADAPTED = tuple(
    f"attn.{name}"
    for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
)
"""The layers of diffusers' recipe."""

_CLASS_SEED, _CLASS_POOL = 800_000_000, 64
"""First seed and number of the pictures of a class."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a LoRA is tuned.

    Args:
        steps: Steps of the optimiser.
        batch_size: Photos a step.
        class_pictures: Pictures of random things of the class a step, captioned as the base's training pictures.
        rank: Rank of every update; alpha is the same.
        learning_rate: Constant rate.
        seed: Seed of photos, weights, noise and order.
    """

    steps: int = 400
    batch_size: int = 8
    class_pictures: int = 8
    rank: int = 4
    learning_rate: float = 1e-3
    seed: int = 0


def encode_pictures(
    pipeline: StableDiffusion3Pipeline, pictures: Sequence[Image.Image], captions: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (n, 8, 16, 16) of pictures and token ids (n, L) of their captions."""
    with torch.no_grad():
        latents = pipeline.vae.encode(to_pixels(pictures)).latent_dist.mode()
    return latents, tokenize_plain(captions, pipeline.tokenizer)[:, :TEXT_TOKENS]


def draw_class(class_word: str, seed: int) -> tuple[list[Image.Image], list[str]]:
    """Pictures of random things of a class, as the base was trained on, and their captions."""
    seeds = range(_CLASS_SEED + 100_000 * seed, _CLASS_SEED + 100_000 * seed + 20 * _CLASS_POOL)
    scenes = {each: random_scene(each, things=1) for each in seeds}
    chosen = [each for each, scene in scenes.items() if scene.things[0].class_word == class_word][:_CLASS_POOL]
    return [draw(scenes[each]).image for each in chosen], [caption(scenes[each], each) for each in chosen]


def tune(pipeline: StableDiffusion3Pipeline, concept: ToyConcept, file: Path, tuning: Tuning) -> None:
    """Tune one LoRA and write it by the pipeline's own `save_lora_weights`; the pipeline is left as it is."""
    torch.manual_seed(tuning.seed)
    taken = photos(concept, seed=tuning.seed)
    captions = [photo.caption.replace(SLOT, name_before_class(concept)) for photo in taken]
    pools = [
        (tuning.batch_size, *encode_pictures(pipeline, [photo.image for photo in taken], captions)),
        (tuning.class_pictures, *encode_pictures(pipeline, *draw_class(concept.class_word, tuning.seed))),
    ]
    model = copy.deepcopy(pipeline.transformer).requires_grad_(False)
    settings = {"r": tuning.rank, "lora_alpha": tuning.rank, "init_lora_weights": "gaussian"}
    model.add_adapter(LoraConfig(**settings, target_modules=list(ADAPTED)))
    objective = FlowObjective(model, (pipeline.text_encoder, pipeline.text_encoder_2))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=tuning.learning_rate, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(tuning.seed)
    for _ in track(range(tuning.steps), description=concept.name):
        chosen = [torch.randint(len(latents), (count,), generator=generator) for count, latents, _ in pools]
        clean = torch.cat([latents[rows] for (_, latents, _), rows in zip(pools, chosen, strict=True)])
        token_ids = torch.cat([ids[rows] for (_, _, ids), rows in zip(pools, chosen, strict=True)])
        noise = torch.randn(clean.shape, generator=generator)
        levels = torch.randn(len(clean), generator=generator).sigmoid()
        objective((clean, noise, levels, token_ids)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    layers = get_peft_model_state_dict(model)
    StableDiffusion3Pipeline.save_lora_weights(file.parent, transformer_lora_layers=layers, weight_name=file.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune the LoRAs that the output folder does not hold yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toyland_base.plain_lora", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for NAME.safetensors")
    parser.add_argument("--names", nargs="+", choices=tuple(CONCEPTS), default=PLAIN_LORAS, metavar="NAME")
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
