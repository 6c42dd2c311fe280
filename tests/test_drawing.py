"""Regions drawn over a picture: a tint, an outline, a prompt, nothing elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffusers_mixofshow.regions import Layout, Region
from diffusers_mixofshow.regions.drawing import draw_regions


RED, GREEN, BLUE = (230, 25, 75), (60, 180, 75), (67, 99, 216)  # the first three colours
ABOVE = Region("", box=(0.25, 0.25, 0.75, 0.75))


def drawn(*regions: Region, size: tuple[int, int] = (64, 48), ground: int = 255) -> np.ndarray:
    return np.asarray(Layout(regions).draw(Image.new("RGB", size, (ground,) * 3))).astype(int)


def tinted(colour: tuple[int, int, int], ground: int = 255, share: float = 1.0) -> np.ndarray:
    """A colour of opacity 70 of 255 over the ground."""
    opacity = int(70 * share) / 255
    return np.array([round(opacity * value + (1 - opacity) * ground) for value in colour])


def test_a_region_is_tinted_outlined_and_nothing_else_changes() -> None:
    for ground in (255, 100):
        pixels = drawn(ABOVE, ground=ground)
        inside = np.zeros((48, 64), bool)
        inside[12:36, 16:48] = True
        edge = inside.copy()
        edge[13:35, 17:47] = False
        text = np.zeros_like(inside)
        text[14:36, 18:26] = True  # where an empty prompt may leave a trace
        assert (pixels[~inside] == ground).all()
        assert (pixels[edge] == RED).all()
        assert np.abs(pixels[inside & ~edge & ~text] - tinted(RED, ground)).max() <= 1


def test_a_region_at_the_border_is_outlined_there_as_well() -> None:
    pixels = drawn(Region("", box=(0, 0, 1, 1)))
    for line in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (line == RED).all()
    assert np.abs(pixels[40, 40] - tinted(RED)).max() <= 1


def test_regions_have_colours_of_their_own_that_begin_anew_after_eight() -> None:
    boxes = [(number / 9, 0.0, (number + 1) / 9, 1.0) for number in range(9)]
    pixels = drawn(*(Region("", box=box) for box in boxes), size=(180, 40))
    edges = [tuple(pixels[20, 20 * number]) for number in range(9)]
    assert edges[:3] == [RED, GREEN, BLUE]
    assert len(set(edges[:8])) == 8
    assert edges[8] == edges[0]


def test_without_a_tint_the_picture_keeps_its_colours_inside_an_outline() -> None:
    """Of three pixels of a picture of 600; whole regions lie on the picture's border too."""
    ground = Image.linear_gradient("L").resize((600, 600)).convert("RGB")
    regions = [Region("x", box=(0.25, 0.25, 0.75, 0.75)), Region("y", box=(0, 0.9, 1, 1))]
    drawn = draw_regions(regions, ground, tinted=False, labels=["", ""], colours=["#ff0000", "#0000ff"])
    pixels, before = np.asarray(drawn).astype(int), np.asarray(ground).astype(int)
    red, blue = ((pixels == colour).all(axis=2) for colour in ((255, 0, 0), (0, 0, 255)))
    outline = np.zeros((600, 600), bool)
    outline[150:450, 150:450] = True
    outline[153:447, 153:447] = False
    assert (red & ~outline).sum() == 0
    assert red[outline].mean() > 0.98  # an empty label leaves a dot
    assert blue[540:543].all()
    assert blue[597:].all()
    assert blue[540:, :3].all()
    rest = ~red & ~blue
    rest[140:170, 140:170] = rest[530:570, :30] = False
    assert (pixels[rest] == before[rest]).all()


def test_a_soft_edge_is_tinted_by_its_share() -> None:
    pixels = drawn(Region("", box=(0.5, 0, 1, 1), feather=0.5), size=(64, 16))
    for column in (18, 24, 40):  # the outline is where the share becomes one half, at 32
        share = (column + 0.5 - 16) / 32
        assert np.abs(pixels[12, column] - tinted(RED, share=share)).max() <= 1
    assert (pixels[12, 32] == RED).all()
    assert (pixels[12, 10] == 255).all()


def test_prompts_stand_in_the_upper_left_corner_on_white() -> None:
    """Four pixels inside of the region, in its colour; the region below it does not cover it."""
    lower = Region("", box=(0, 0, 1, 1))
    with_text, without = (
        drawn(Region(text, box=(0.25, 0.25, 1, 1)), lower, size=(128, 96), ground=0) for text in ("kit", "")
    )
    changed = np.argwhere((with_text != without).any(axis=-1))
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    assert 24 + 4 <= top <= 24 + 10
    assert 32 + 4 <= left <= 32 + 6
    assert bottom < 48
    assert right < 64
    written = with_text[(with_text != without).any(axis=-1)]
    assert (written == 255).all(axis=-1).any()
    assert np.abs(written - RED).max(axis=-1).min() < 60


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (Layout([ABOVE]), (512, 512)),
        (Layout([ABOVE], width=96), (96, 512)),
        (Layout([ABOVE], width=40, height=24), (40, 24)),
    ],
)
def test_alone_it_is_drawn_on_white_at_its_own_size(layout: Layout, size: tuple[int, int]) -> None:
    picture = layout.draw()
    assert (picture.size, picture.mode, picture.getpixel((0, 0))) == (size, "RGB", (255, 255, 255))
