"""Fuse plain LoRAs, such as people share, into one that diffusers loads: `python examples/04_fuse_found_loras.py`.

As files from elsewhere would need a download, the concepts of 01_train.py are written as plain LoRAs first: their
updates in kohya's names, without the words that they have learnt. It leaves `found/`, the result in
`both/pytorch_lora_weights.safetensors`, and a picture for each LoRA.
"""

from pathlib import Path

import torch

from diffusers_mixofshow import EDLoRA, GradientFuser, LoRASource, MixOfShowPipeline
from diffusers_mixofshow.interop import write_kohya


PLACES = ("in a meadow", "on the beach", "at night")

sources = []
for name, trigger in (("rex", "dog"), ("ming", "vase")):
    file = write_kohya(Path("found", f"{name}.safetensors"), EDLoRA.from_pretrained(f"concepts/{name}").lora)
    sources.append(LoRASource(file, prompts=[f"a {trigger} {place}" for place in PLACES]))  # say its trigger words

pipe = MixOfShowPipeline.from_pretrained("toyland")
fused = GradientFuser(pipe, steps=5).fuse(sources)
fused.save_pretrained("both", overwrite=True)
fused.report.print()

pipe.load_lora_weights("both")  # as every pipeline of diffusers does
for trigger in ("dog", "vase"):
    settings = {"num_inference_steps": 20, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(3)}
    picture = pipe(f"a {trigger} in the snow", **settings).images[0]
    picture.resize((256, 256)).save(f"{trigger}.png")
