"""What is read off pictures of three things: as much as they show, and nothing of things in other places."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from benchmarks.toyland_base.quality import measure_threes
from diffusers_mixofshow.toyland.base import load_reader
from diffusers_mixofshow.toyland.scenes import place_thing, residents
from diffusers_mixofshow.toyland.world import CLASSES, WIDE, Scene, draw


class Painter:
    """In place of a base: draws what prompts ask for, from left to right or the other way round."""

    def __init__(self, *, reverse: bool) -> None:
        self.reverse = reverse

    def __call__(self, prompts: list[str], *, height: int, width: int, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(images=[self.paint(prompt).resize((width, height)) for prompt in prompts])

    def paint(self, prompt: str) -> Image.Image:
        asked = re.findall(rf"(\w+) ({'|'.join(CLASSES)})\b", prompt)[:: -1 if self.reverse else 1]
        rng = random.Random(0)
        looks = [next(one for one in residents().values() if (one.colour, one.class_word) == each) for each in asked]
        placed = [place_thing(thing, rng, slot=slot, slots=3, width=WIDE) for slot, thing in enumerate(looks)]
        return draw(Scene(background="snow", things=tuple(placed), mirrored=False, width=WIDE)).image


@pytest.mark.parametrize(("reverse", "least", "most"), [(False, 0.9, 1.0), (True, 0.2, 0.5)])
def test_three_things_are_right_where_the_prompt_puts_them(reverse: bool, least: float, most: float) -> None:
    """The one in the middle stays there; of a reversed picture no more than it and a few equal ones are right."""
    found = measure_threes(Painter(reverse=reverse), load_reader(), 24, 3.0, height=96)
    assert least <= found["things"] <= most
    assert found["pictures"] <= found["things"]
    assert (found["pictures"] > 0.7) is not reverse
