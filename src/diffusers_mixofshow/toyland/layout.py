"""Condition images for Toyland's T2I-Adapter (arXiv:2302.08453): where things stand, how high and how wide.

The Mix-of-Show paper samples several concepts with such an adapter (section 3.4); it takes keyposes of people, Toyland
takes ellipses. As every class has a width of its own, an ellipse tells a dog from a vase; it never tells one dog from
another.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from diffusers_mixofshow.toyland.world import HEIGHT, WIDTH_OF_HEIGHT


Box = tuple[float, float, float, float]

_SUPERSAMPLING = 4


def draw_places(boxes: Sequence[Box], width: int = HEIGHT, height: int = HEIGHT) -> Image.Image:
    """Draw the condition image of `load_layout_adapter`: a white ellipse on black for every thing.

    Args:
        boxes: (left, top, right, bottom) of each thing, as fractions of the picture.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.

    Returns:
        A picture of mode ``L``.
    """
    large = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    pen = ImageDraw.Draw(large)
    for left, top, right, bottom in boxes:
        pen.ellipse((left * large.width, top * large.height, right * large.width, bottom * large.height), 255)
    return large.reduce(_SUPERSAMPLING)


def stand_in(boxes: Sequence[Box], class_words: Sequence[str], width: int = HEIGHT, height: int = HEIGHT) -> list[Box]:
    """Compute boxes of things that stand in the middle of larger boxes, such as regions.

    Args:
        boxes: The larger boxes: (left, top, right, bottom), as fractions of the picture.
        class_words: The class of the thing in each box, which decides its ratio of width to height.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
    """
    placed: list[Box] = []
    for (left, top, right, bottom), class_word in zip(boxes, class_words, strict=True):
        shape = WIDTH_OF_HEIGHT[class_word]
        high = min(0.78 * (bottom - top) * height, 0.95 * (right - left) * width / shape)  # in pixels
        half = shape * high / width / 2
        middle, ground = (left + right) / 2, bottom - 0.07 * (bottom - top)
        placed.append((middle - half, ground - high / height, middle + half, ground))
    return placed
