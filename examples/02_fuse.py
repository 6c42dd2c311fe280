"""Fuse the concepts of 01_train.py into one small file, without any photo: `python examples/02_fuse.py`.

Each concept is drawn once with its own LoRA, from the prompts below, and every layer gets the weights that keep what
all of them do. Take places and light like those that you will ask for.
"""

from diffusers_mixofshow import GradientFuser, MixOfShowPipeline


PROMPTS = ["a <TOK> in a meadow", "a <TOK> on the beach", "a <TOK> in the snow", "a <TOK> at night"]

pipe = MixOfShowPipeline.from_pretrained("toyland")
fused = GradientFuser(pipe, prompts=PROMPTS, steps=5).fuse(["concepts/rex", "concepts/ming"])
fused.save_pretrained("fused", overwrite=True)
fused.report.print()  # 0: as the concept's own model, 1: as the base
