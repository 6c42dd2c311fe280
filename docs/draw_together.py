"""Draw docs/images/together.png, the first picture of README: `python docs/draw_together.py mixofshow-demo`.

Needs the folder that `mixofshow demo` leaves: photos of three concepts, and the pack in which these are fused.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusers_mixofshow import Draft, Isolation, MixOfShowPipeline, Refinement, Region


PICTURE = Path(__file__).resolve().parent / "images" / "together.png"
COLUMNS = {"kiki": (0.0, 0.31), "rex": (0.31, 0.69), "bobo": (0.69, 1.0)}
"""Concept to the left and right of its region; a dog is wider than critters."""
SEED = 1
WIDTH, HEIGHT, SCALE, GAP = 128, 64, 4, 8


def draw(pipe: Any, prompt: str, **regional: Any) -> Image.Image:
    """One picture, enlarged."""
    generator = torch.Generator().manual_seed(SEED)
    size = {"height": HEIGHT, "width": WIDTH}
    drawn = pipe(prompt, **size, num_inference_steps=20, guidance_scale=3.0, generator=generator, **regional)
    return enlarge(drawn.images[0], (SCALE * WIDTH, SCALE * HEIGHT))


def enlarge(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in this size, smoothly."""
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def main(demo: Path) -> None:
    """A photo of each concept, one picture with a region for each, and one by a prompt that names all three."""
    pipe = MixOfShowPipeline.from_pretrained("toyland")
    pipe.load_edlora(demo / "fused")
    regions = [
        Region(f"a <{name}>, in a meadow", box=(left, 0.2, right, 0.97)) for name, (left, right) in COLUMNS.items()
    ]
    ways = {"isolation": Isolation(), "draft": Draft(), "refine": Refinement()}
    with_regions = draw(pipe, "a critter, a dog and a critter in a meadow", regions=regions, **ways)
    without = draw(pipe, "a <kiki>, a <rex> and a <bobo> in a meadow")
    side = (SCALE * HEIGHT - 2 * GAP) // 3
    canvas = Image.new("RGB", (side + 2 * (3 * GAP + with_regions.width), SCALE * HEIGHT), "white")
    for number, name in enumerate(COLUMNS):
        photo = Image.open(demo / "photos" / name / "0000.png")
        canvas.paste(enlarge(photo, (side, side)), (0, number * (side + GAP)))
    canvas.paste(with_regions, (side + 3 * GAP, 0))
    canvas.paste(without, (side + 6 * GAP + with_regions.width, 0))
    canvas.quantize(192).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
