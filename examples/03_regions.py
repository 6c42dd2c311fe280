"""Draw the concepts of 02_fuse.py in one picture, each in its region: `python examples/03_regions.py`.

It leaves `together.png`, and `layout.png`, the regions over the picture.
"""

import torch

from diffusers_mixofshow import Draft, Layout, MixOfShowPipeline, Refinement, Region


pipe = MixOfShowPipeline.from_pretrained("toyland")
pipe.load_edlora("fused")

layout = Layout(
    prompt="a dog and a vase in a meadow",
    width=96,
    height=64,
    regions=(  # left, top, right, bottom; square, as a dog of Toyland is as wide as it is high
        Region("a <rex>, in a meadow", box=(0.0, 0.25, 0.5, 0.97)),
        Region("a <ming>, in a meadow", box=(0.5, 0.25, 1.0, 0.97)),
    ),
)
picture = pipe(
    **layout.arguments(),
    draft=Draft(),  # draws each region alone for a few steps first
    refine=Refinement(),  # and anew in the end, at the model's own size
    num_inference_steps=20,
    guidance_scale=3.0,
    generator=torch.Generator().manual_seed(2),
).images[0]

large = picture.resize((480, 320))
large.save("together.png")
layout.draw(large).save("layout.png")
