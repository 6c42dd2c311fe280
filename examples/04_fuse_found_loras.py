"""Fuse plain LoRAs, such as people share, into one that diffusers loads: `python examples/04_fuse_found_loras.py`.

As files from elsewhere would need a download, two are trained first, in some minutes: a dog and a vase, in kohya's
names, with no words but "dog" and "vase". It leaves `found/`, the result in `both/pytorch_lora_weights.safetensors`,
and a picture for each LoRA.
"""

from pathlib import Path

import torch

from diffusers_mixofshow import EDLoRATrainer, GradientFuser, LoRASource, MixOfShowPipeline, TrainingConfig, toyland
from diffusers_mixofshow.interop import write_kohya


PLACES = ("in a meadow", "on the beach", "at night")

sources = []
for name in ("rex", "ming"):
    known = toyland.CONCEPTS[name]
    config = TrainingConfig.toyland(
        instance_data_dir=toyland.write_photos(known, Path("photos", name), count=8),
        concept=name,
        class_word=known.class_word,
        method="lora",
        embedding_phase_steps=0,
        embedding_learning_rate=0.0,  # its only word stays "dog", or "vase"
    )
    file = write_kohya(Path("found", f"{name}.safetensors"), EDLoRATrainer(config).train().lora)
    # A LoRA acts when its trigger words are said.
    sources.append(LoRASource(file, prompts=[f"a {known.class_word} {place}" for place in PLACES]))

pipe = MixOfShowPipeline.from_pretrained("toyland")
fused = GradientFuser(pipe, steps=5).fuse(sources)
fused.save_pretrained("both", overwrite=True)
fused.report.print()  # 0: as the LoRA's own model, 1: as the base

pipe.load_lora_weights("both")  # as every pipeline of diffusers does
for trigger in ("dog", "vase"):
    picture = pipe(
        f"a {trigger} in the snow",
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    picture.resize((256, 256)).save(f"{trigger}.png")
