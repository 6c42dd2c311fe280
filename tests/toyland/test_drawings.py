"""The drawn world stays what the embedded base was trained on: pictures and captions of an earlier day.

``python tests/toyland/test_drawings.py`` writes ``drawn.png`` and ``captions.txt``; a change of the world needs a base
trained anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_mixofshow.toyland.concepts import CONCEPTS, photos
from diffusers_mixofshow.toyland.scenes import caption, random_scene
from diffusers_mixofshow.toyland.world import HEIGHT, draw


HERE = Path(__file__).parent
ACROSS = 10
# Other versions of Pillow round the colour of two or three pixels of a picture otherwise.
ROUNDED, OTHERWISE = 16, 6


def _tiles() -> list[Image.Image]:
    """Random scenes of one thing and of two, and for each concept a photo of it and its mask."""
    scenes = [draw(random_scene(seed, things=1 + seed // 48)).image for seed in range(68)]
    shown = [photo for concept in CONCEPTS.values() for photo in photos(concept, 1)]
    return [*scenes, *(picture.convert("RGB") for photo in shown for picture in (photo.image, photo.mask))]


def _captions() -> list[str]:
    lines = [caption(random_scene(seed, things=1 + seed % 3), seed) for seed in range(90)]
    return lines + [photo.caption for concept in CONCEPTS.values() for photo in photos(concept, 3)]


def _place(number: int) -> tuple[int, int]:
    return number % ACROSS * HEIGHT, number // ACROSS * HEIGHT


def test_pictures_are_those_of_an_earlier_day() -> None:
    with Image.open(HERE / "drawn.png") as kept:
        for number, tile in enumerate(_tiles()):
            left, top = _place(number)
            earlier = np.asarray(kept.crop((left, top, left + HEIGHT, top + HEIGHT)), dtype=int)
            difference = np.abs(np.asarray(tile, dtype=int) - earlier).max(axis=2)
            assert difference.max() <= ROUNDED, number
            assert (difference > 0).sum() <= OTHERWISE, number


def test_captions_are_those_of_an_earlier_day() -> None:
    assert _captions() == (HERE / "captions.txt").read_text(encoding="utf-8").splitlines()


def test_every_concept_is_listed_by_its_name() -> None:
    assert list(CONCEPTS) == [concept.name for concept in CONCEPTS.values()]


if __name__ == "__main__":
    tiles = _tiles()
    sheet = Image.new("RGB", (ACROSS * HEIGHT, -(-len(tiles) // ACROSS) * HEIGHT))
    for number, tile in enumerate(tiles):
        sheet.paste(tile, _place(number))
    sheet.save(HERE / "drawn.png", optimize=True)
    (HERE / "captions.txt").write_text("\n".join(_captions()) + "\n", encoding="utf-8")
