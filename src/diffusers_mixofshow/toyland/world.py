"""Toyland's drawn world: scenes as data, and pictures as a pure function of a scene."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw


HEIGHT = 64
"""Height of every picture in pixels; also the width of pictures of one or two things."""

WIDE = 96
"""Width of pictures of three things in pixels."""

_SUPERSAMPLING = 4
_OUTLINE = 3 / 256
"""Width of outlines, as a fraction of the picture's height."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 218, 50),
    "green": (60, 166, 70),
    "blue": (45, 100, 222),
    "purple": (140, 60, 180),
    "pink": (250, 140, 190),
    "white": (244, 244, 240),
    "black": (44, 42, 48),
    "brown": (134, 84, 44),
    "grey": (146, 148, 154),
    "cyan": (50, 205, 215),
    "lime": (180, 240, 40),
    "silver": (196, 204, 224),
}
"""Every colour that a thing can have. The training world draws only those listed in `ATTRIBUTES`."""

_CRITTER_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
_FUR_COLOURS = ("brown", "white", "black", "grey", "orange")
_WARE_COLOURS = ("red", "yellow", "green", "blue", "brown", "white")
_ACCENTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")

MAIN_COLOURS: dict[str, tuple[str, ...]] = {
    "critter": _CRITTER_COLOURS,
    "dog": _FUR_COLOURS,
    "cat": _FUR_COLOURS,
    "vase": _WARE_COLOURS,
    "chair": _WARE_COLOURS,
    "table": _WARE_COLOURS,
}
"""Class to its main colours; the main colour is the only attribute that captions name."""

ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    "critter": {
        "ear_shape": ("round", "pointy", "long", "horn"),
        "ear_colour": _ACCENTS,
        "eyes": ("one", "two"),
        "eye_colour": ("white", "yellow", "green", "blue"),
        "pattern": ("plain", "stripes", "spots"),
        "pattern_colour": _ACCENTS,
        "belly_colour": _ACCENTS,
        "hat": ("bare", "cone", "top", "crown"),
        "hat_colour": ("red", "yellow", "blue", "black"),
    },
    "dog": {
        "ear_colour": _FUR_COLOURS,
        "pattern": ("plain", "spots", "stripes"),
        "pattern_colour": _FUR_COLOURS,
        "collar_colour": ("red", "yellow", "green", "blue"),
    },
    "cat": {
        "ear_colour": _FUR_COLOURS,
        "pattern": ("plain", "stripes"),
        "pattern_colour": _FUR_COLOURS,
        "belly_colour": _FUR_COLOURS,
        "collar_colour": ("red", "yellow", "green", "blue"),
    },
    "vase": {
        "shape": ("round", "tall"),
        "pattern": ("plain", "stripes", "spots"),
        "pattern_colour": _ACCENTS,
        "flower_colour": ("red", "yellow", "pink", "white"),
    },
    "chair": {"shape": ("round", "square"), "cushion_colour": _ACCENTS},
    "table": {"leg_colour": _WARE_COLOURS, "cloth_colour": _ACCENTS},
}
"""Class to its hidden attributes, with the values in the base's training pictures."""

CLASSES = tuple(ATTRIBUTES)
BACKGROUNDS = ("meadow", "beach", "desert", "snow", "night", "room")

BACKGROUND_COLOURS: dict[str, dict[str, tuple[int, int, int]]] = {
    "meadow": {"sky": (150, 206, 246), "ground": (120, 196, 92), "detail": (84, 158, 74)},
    "beach": {"sky": (176, 226, 250), "ground": (242, 222, 160), "detail": (48, 132, 196)},
    "desert": {"sky": (252, 206, 140), "ground": (222, 166, 88), "detail": (70, 130, 70)},
    "snow": {"sky": (196, 212, 226), "ground": (250, 252, 255), "detail": (36, 92, 76)},
    "night": {"sky": (24, 26, 72), "ground": (44, 56, 78), "detail": (250, 244, 190)},
    "room": {"sky": (236, 214, 190), "ground": (168, 112, 72), "detail": (140, 198, 236)},
}
"""Colours of every background; a scene can replace single ones by a name of `COLOURS`."""

WIDTH_OF_HEIGHT = {"critter": 0.86, "dog": 1.0, "cat": 0.86, "vase": 0.66, "chair": 0.72, "table": 1.16}
"""Class to the width of its things, as a fraction of their height."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One thing of a scene.

    Args:
        class_word: One of `CLASSES`.
        colour: Main colour, a key of `COLOURS`.
        name: Name of a resident in captions; empty for all others.
        attributes: Hidden attributes by name; those left out get a plain default.
        centre: Horizontal middle, as a fraction of the picture's width.
        ground: Lower edge, as a fraction of the picture's height from the top.
        size: Height, as a fraction of the picture's height.
    """

    class_word: str
    colour: str
    name: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict[str, str])
    centre: float = 0.5
    ground: float = 0.95
    size: float = 0.85


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A background and the things in front of it, from left to right.

    Args:
        background: One of `BACKGROUNDS`.
        things: One to three things.
        mirrored: Whether the background is mirrored.
        colours: ``sky``, ``ground`` or ``detail`` to a key of `COLOURS`, which replaces the background's own colour.
        width: Width of the picture in pixels, where it is 64 pixels high.
    """

    background: str
    things: tuple[Thing, ...]
    mirrored: bool = False
    colours: Mapping[str, str] = field(default_factory=dict[str, str])
    width: int = HEIGHT


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A scene's picture, each thing's mask (mode ``L``) and box (left, top, right, bottom, as fractions)."""

    image: Image.Image
    masks: tuple[Image.Image, ...]
    boxes: tuple[tuple[float, float, float, float], ...]


Colour = tuple[int, int, int]
Point = tuple[float, float]


class _Brush:
    """Draws outlined shapes of one thing into a picture, and the same shapes into its mask.

    Coordinates are relative to the thing, in units of its size: x from -0.5 to 0.5, y from 0 (ground) to 1 (top).
    """

    def __init__(self, image: Image.Image, mask: Image.Image, thing: Thing) -> None:
        self._image = ImageDraw.Draw(image)
        self._mask = ImageDraw.Draw(mask)
        self._size = thing.size * image.height
        self._x = thing.centre * image.width
        self._y = thing.ground * image.height
        self._outline = round(_OUTLINE * image.height)

    def _place(self, point: Point) -> Point:
        return self._x + point[0] * self._size, self._y - point[1] * self._size

    def ellipse(self, centre: Point, radii: Point, colour: Colour, outline: bool = True) -> None:
        """Draw an ellipse with half axes `radii`."""
        left, top = self._place((centre[0] - radii[0], centre[1] + radii[1]))
        right, bottom = self._place((centre[0] + radii[0], centre[1] - radii[1]))
        box = (left, top, right, bottom)
        self._image.ellipse(box, colour, _darken(colour) if outline else None, self._outline if outline else 0)
        self._mask.ellipse(box, 255)

    def polygon(self, points: Sequence[Point], colour: Colour, outline: bool = True) -> None:
        """Draw a filled polygon."""
        placed = [self._place(point) for point in points]
        self._image.polygon(placed, colour, _darken(colour) if outline else None, self._outline if outline else 1)
        self._mask.polygon(placed, 255)

    def rectangle(self, left: float, bottom: float, right: float, top: float, colour: Colour) -> None:
        """Draw an upright rectangle."""
        self.polygon([(left, bottom), (left, top), (right, top), (right, bottom)], colour)

    def band(self, centre: Point, radii: Point, low: float, high: float, colour: Colour) -> None:
        """Draw the part of an ellipse between the heights `low` and `high`, both from -1 to 1."""
        heights = [low + (high - low) * step / 6 for step in range(7)]
        right = [(centre[0] + radii[0] * math.sqrt(max(0.0, 1 - v * v)), centre[1] + radii[1] * v) for v in heights]
        self.polygon(right + [(2 * centre[0] - x, y) for x, y in reversed(right)], colour, outline=False)


def _darken(colour: Colour) -> Colour:
    return (colour[0] // 2, colour[1] // 2, colour[2] // 2)


def _draw_pattern(brush: _Brush, thing: Thing, centre: Point, radii: Point) -> None:
    """Draw stripes, spots or checks on an elliptic body."""
    pattern = thing.attributes.get("pattern", "plain")
    if pattern == "plain":
        return
    colour = COLOURS[thing.attributes.get("pattern_colour", "black")]
    if pattern == "stripes":
        for low in (-0.72, -0.12, 0.48):
            brush.band(centre, radii, low, low + 0.32, colour)
    elif pattern == "spots":
        for x, y in ((-0.66, -0.3), (0.66, -0.3), (-0.62, 0.36), (0.62, 0.36), (0.0, 0.74), (0.0, -0.72), (0.0, 0.1)):
            place = (centre[0] + x * radii[0], centre[1] + y * radii[1])
            brush.ellipse(place, (0.2 * min(radii), 0.2 * min(radii)), colour, outline=False)
    else:
        for x in (-0.75, -0.25, 0.25):
            for y in (-0.75, -0.25, 0.25):
                if (x + y) % 1.0 == 0:
                    corner = (centre[0] + x * radii[0], centre[1] + y * radii[1])
                    side = (0.5 * radii[0], 0.5 * radii[1])
                    points = [(0.0, 0.0), (side[0], 0.0), side, (0.0, side[1])]
                    brush.polygon([(corner[0] + u, corner[1] + v) for u, v in points], colour, outline=False)


def _draw_eye(brush: _Brush, centre: Point, radius: float, colour: Colour) -> None:
    brush.ellipse(centre, (radius, radius), colour)
    brush.ellipse(centre, (0.45 * radius, 0.45 * radius), (20, 20, 24), outline=False)


def _draw_ears(brush: _Brush, shape: str, colour: Colour) -> None:
    for side in (-1, 1):
        if shape == "round":
            brush.ellipse((side * 0.29, 0.74), (0.14, 0.14), colour)
        elif shape == "pointy":
            brush.polygon([(side * 0.08, 0.66), (side * 0.40, 0.97), (side * 0.42, 0.5)], colour)
        elif shape == "long":
            brush.ellipse((side * 0.25, 0.79), (0.09, 0.2), colour)
        elif shape == "horn":
            brush.polygon(
                [(side * x, y) for x, y in ((0.16, 0.64), (0.3, 0.8), (0.2, 0.98), (0.43, 0.82), (0.38, 0.54))], colour
            )
        else:
            brush.polygon([(side * 0.1, 0.6), (side * 0.24, 0.86), (side * 0.3, 0.84), (side * 0.2, 0.6)], colour)
            brush.ellipse((side * 0.28, 0.89), (0.1, 0.1), colour)


def _draw_hat(brush: _Brush, hat: str, colour: Colour) -> None:
    if hat == "cone":
        brush.polygon([(-0.15, 0.68), (0.0, 1.0), (0.15, 0.68)], colour)
    elif hat == "top":
        brush.rectangle(-0.11, 0.68, 0.11, 0.95, colour)
        brush.rectangle(-0.2, 0.67, 0.2, 0.74, colour)
    elif hat == "crown":
        points = ((-0.17, 0.67), (-0.19, 0.93), (-0.09, 0.8), (0.0, 0.96), (0.09, 0.8), (0.19, 0.93), (0.17, 0.67))
        brush.polygon(points, colour)


def _draw_critter(brush: _Brush, thing: Thing) -> None:
    main, hidden = COLOURS[thing.colour], thing.attributes
    centre, radii = (0.0, 0.38), (0.36, 0.34)
    if hidden.get("wings") == "wings":
        for side in (-1, 1):
            brush.polygon([(side * 0.3, 0.3), (side * 0.5, 0.62), (side * 0.52, 0.16)], COLOURS["silver"])
    _draw_ears(brush, hidden.get("ear_shape", "round"), COLOURS[hidden.get("ear_colour", thing.colour)])
    for side in (-1, 1):
        brush.ellipse((side * 0.17, 0.05), (0.13, 0.06), main)
    brush.ellipse(centre, radii, main)
    _draw_pattern(brush, thing, centre, (radii[0] * 0.95, radii[1] * 0.95))
    brush.ellipse((0.0, 0.22), (0.2, 0.165), COLOURS[hidden.get("belly_colour", thing.colour)])
    eye = COLOURS[hidden.get("eye_colour", "white")]
    eyes = {"one": ((0.0, 0.135),), "two": ((-0.13, 0.11), (0.13, 0.11))}.get(
        hidden.get("eyes", "two"), ((-0.2, 0.085), (0.0, 0.085), (0.2, 0.085))
    )
    for x, radius in eyes:
        _draw_eye(brush, (x, 0.53), radius, eye)
    _draw_hat(brush, hidden.get("hat", "bare"), COLOURS[hidden.get("hat_colour", "red")])


def _draw_dog(brush: _Brush, thing: Thing) -> None:
    main, hidden = COLOURS[thing.colour], thing.attributes
    ear = COLOURS[hidden.get("ear_colour", thing.colour)]
    brush.polygon([(-0.38, 0.5), (-0.5, 0.78), (-0.42, 0.8), (-0.28, 0.52)], main)
    for x in (-0.38, -0.2, 0.02, 0.18):
        brush.rectangle(x, 0.0, x + 0.12, 0.34, main)
    centre, radii = (-0.06, 0.42), (0.37, 0.2)
    brush.ellipse(centre, radii, main)
    _draw_pattern(brush, thing, centre, (radii[0] * 0.94, radii[1] * 0.94))
    brush.polygon([(0.06, 0.5), (0.3, 0.46), (0.32, 0.56), (0.08, 0.6)], COLOURS[hidden.get("collar_colour", "red")])
    brush.ellipse((0.22, 0.74), (0.2, 0.21), main)
    brush.ellipse((0.37, 0.67), (0.13, 0.09), main)
    brush.ellipse((0.46, 0.7), (0.045, 0.045), (24, 22, 26), outline=False)
    brush.ellipse((0.08, 0.72), (0.1, 0.2), ear)
    _draw_eye(brush, (0.27, 0.81), 0.06, COLOURS["white"])


def _draw_cat(brush: _Brush, thing: Thing) -> None:
    main, hidden = COLOURS[thing.colour], thing.attributes
    ear = COLOURS[hidden.get("ear_colour", thing.colour)]
    tail = ((0.2, 0.04), (0.4, 0.1), (0.43, 0.3), (0.34, 0.46), (0.26, 0.4), (0.33, 0.28), (0.3, 0.17), (0.18, 0.15))
    brush.polygon(tail, main)
    centre, radii = (0.0, 0.25), (0.27, 0.27)
    brush.ellipse(centre, radii, main)
    _draw_pattern(brush, thing, centre, (radii[0] * 0.95, radii[1] * 0.95))
    brush.ellipse((0.0, 0.17), (0.14, 0.16), COLOURS[hidden.get("belly_colour", thing.colour)])
    for side in (-1, 1):
        brush.polygon([(side * 0.05, 0.84), (side * 0.28, 1.0), (side * 0.31, 0.66)], ear)
    brush.ellipse((0.0, 0.49), (0.2, 0.06), COLOURS[hidden.get("collar_colour", "red")])
    brush.ellipse((0.0, 0.69), (0.31, 0.21), main)
    for side in (-1, 1):
        brush.ellipse((side * 0.13, 0.73), (0.075, 0.06), COLOURS["lime"])
        brush.ellipse((side * 0.13, 0.73), (0.022, 0.055), (20, 20, 24), outline=False)
    brush.polygon([(-0.05, 0.64), (0.05, 0.64), (0.0, 0.58)], COLOURS["pink"], outline=False)


def _draw_vase(brush: _Brush, thing: Thing) -> None:
    main, hidden = COLOURS[thing.colour], thing.attributes
    flower = COLOURS[hidden.get("flower_colour", "red")]
    stem = (50, 120, 50)
    for x, y in ((-0.2, 0.84), (0.2, 0.84), (0.0, 0.9)):
        brush.polygon([(-0.02, 0.55), (x - 0.02, y), (x + 0.02, y), (0.02, 0.55)], stem, outline=False)
        brush.ellipse((x, y), (0.1, 0.1), flower)
        brush.ellipse((x, y), (0.035, 0.035), COLOURS["orange"], outline=False)
    if hidden.get("shape", "round") == "round":
        brush.rectangle(-0.12, 0.45, 0.12, 0.68, main)
        centre, radii = (0.0, 0.28), (0.31, 0.28)
        brush.ellipse(centre, radii, main)
    else:
        centre, radii = (0.0, 0.3), (0.19, 0.36)
        brush.polygon([(-0.14, 0.0), (-0.22, 0.3), (-0.16, 0.68), (0.16, 0.68), (0.22, 0.3), (0.14, 0.0)], main)
    _draw_pattern(brush, thing, centre, (radii[0] * 0.95, radii[1] * 0.95))
    brush.rectangle(-0.17, 0.65, 0.17, 0.71, main)


def _draw_chair(brush: _Brush, thing: Thing) -> None:
    main, hidden = COLOURS[thing.colour], thing.attributes
    if hidden.get("shape", "square") == "square":
        brush.rectangle(-0.27, 0.45, 0.27, 1.0, main)
        brush.rectangle(-0.14, 0.56, 0.14, 0.88, COLOURS[hidden.get("cushion_colour", "white")])
    else:
        brush.ellipse((0.0, 0.72), (0.29, 0.28), main)
        brush.ellipse((0.0, 0.72), (0.16, 0.15), COLOURS[hidden.get("cushion_colour", "white")])
    for x in (-0.3, 0.22):
        brush.rectangle(x, 0.0, x + 0.08, 0.36, main)
    brush.polygon([(-0.32, 0.3), (-0.25, 0.46), (0.25, 0.46), (0.32, 0.3)], main)
    brush.ellipse((0.0, 0.43), (0.25, 0.08), COLOURS[hidden.get("cushion_colour", "white")])


def _draw_table(brush: _Brush, thing: Thing) -> None:
    main, hidden = COLOURS[thing.colour], thing.attributes
    leg = COLOURS[hidden.get("leg_colour", thing.colour)]
    for x in (-0.5, 0.4):
        brush.rectangle(x, 0.0, x + 0.1, 0.5, leg)
    brush.polygon([(-0.58, 0.44), (-0.44, 0.7), (0.44, 0.7), (0.58, 0.44)], main)
    brush.rectangle(-0.58, 0.36, 0.58, 0.46, main)
    cloth = COLOURS[hidden.get("cloth_colour", "white")]
    brush.polygon([(-0.2, 0.22), (-0.2, 0.46), (-0.15, 0.7), (0.15, 0.7), (0.2, 0.46), (0.2, 0.22)], cloth)


_PAINTERS = {
    "critter": _draw_critter,
    "dog": _draw_dog,
    "cat": _draw_cat,
    "vase": _draw_vase,
    "chair": _draw_chair,
    "table": _draw_table,
}


class _Canvas:
    """Draws parts of a background, in coordinates as fractions of the picture, mirrored if the scene is."""

    def __init__(self, image: Image.Image, mirrored: bool) -> None:
        self._draw = ImageDraw.Draw(image)
        self._width, self._height = image.size
        self._mirrored = mirrored

    def _x(self, x: float) -> float:
        return (1 - x if self._mirrored else x) * self._width

    def strip(self, top: float, bottom: float, colour: Colour) -> None:
        """Draw a strip over the whole width."""
        self._draw.rectangle((0, top * self._height, self._width, bottom * self._height), colour)

    def hill(self, x: float, reach: float, top: float, bottom: float, colour: Colour) -> None:
        """Draw an ellipse with the middle `x` and the horizontal half axis `reach`, both in widths of the picture."""
        middle, half = self._x(x), reach * self._width
        self._draw.ellipse((middle - half, top * self._height, middle + half, bottom * self._height), colour)

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """Draw a circle whose radius is a fraction of the picture's height."""
        middle, reach = self._x(x), radius * self._height
        top = y * self._height - reach
        self._draw.ellipse((middle - reach, top, middle + reach, top + 2 * reach), colour)

    def shape(self, points: Sequence[Point], colour: Colour) -> None:
        """Draw a polygon."""
        self._draw.polygon([(self._x(x), y * self._height) for x, y in points], colour)


def _paint_meadow(canvas: _Canvas, ground: Colour, detail: Colour) -> None:
    canvas.hill(0.25, 0.6, 0.42, 1.4, detail)
    canvas.strip(0.7, 1.0, ground)
    for x, y in ((0.06, 0.8), (0.2, 0.93), (0.94, 0.82), (0.8, 0.94)):
        canvas.disc(x, y, 0.028, (250, 250, 240))


def _paint_beach(canvas: _Canvas, ground: Colour, detail: Colour) -> None:
    canvas.strip(0.42, 0.66, detail)
    canvas.strip(0.66, 1.0, ground)
    canvas.disc(0.86, 0.16, 0.1, (255, 228, 90))


def _paint_desert(canvas: _Canvas, ground: Colour, detail: Colour) -> None:
    canvas.strip(0.66, 1.0, ground)
    canvas.hill(0.7, 0.55, 0.5, 1.1, ground)
    canvas.shape([(0.07, 0.76), (0.07, 0.26), (0.15, 0.26), (0.15, 0.76)], detail)
    canvas.shape([(0.0, 0.42), (0.0, 0.5), (0.1, 0.58), (0.1, 0.5)], detail)


def _paint_snow(canvas: _Canvas, ground: Colour, detail: Colour) -> None:
    for x, top in ((0.1, 0.18), (0.9, 0.26), (0.3, 0.36)):
        canvas.shape([(x - 0.14, 0.72), (x, top), (x + 0.14, 0.72)], detail)
    canvas.strip(0.68, 1.0, ground)


def _paint_night(canvas: _Canvas, ground: Colour, detail: Colour) -> None:
    canvas.strip(0.72, 1.0, ground)
    canvas.disc(0.84, 0.17, 0.11, detail)
    for x, y in ((0.1, 0.12), (0.3, 0.06), (0.06, 0.4), (0.94, 0.46), (0.6, 0.08)):
        canvas.disc(x, y, 0.02, (255, 255, 255))


def _paint_room(canvas: _Canvas, ground: Colour, detail: Colour) -> None:
    canvas.strip(0.72, 1.0, ground)
    canvas.shape([(0.04, 0.5), (0.04, 0.08), (0.34, 0.08), (0.34, 0.5)], (250, 250, 245))
    canvas.shape([(0.07, 0.46), (0.07, 0.12), (0.31, 0.12), (0.31, 0.46)], detail)


_BACKGROUND_PAINTERS = {
    "meadow": _paint_meadow,
    "beach": _paint_beach,
    "desert": _paint_desert,
    "snow": _paint_snow,
    "night": _paint_night,
    "room": _paint_room,
}


def _draw_background(image: Image.Image, scene: Scene) -> None:
    """Draw sky above, ground below, and a few large details by which the six backgrounds differ."""
    palette = dict(BACKGROUND_COLOURS[scene.background])
    palette |= {part: COLOURS[name] for part, name in scene.colours.items()}
    canvas = _Canvas(image, scene.mirrored)
    canvas.strip(0.0, 1.0, palette["sky"])
    _BACKGROUND_PAINTERS[scene.background](canvas, palette["ground"], palette["detail"])


def _find_box(mask: Image.Image) -> tuple[float, float, float, float]:
    left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
    return left / mask.width, top / mask.height, right / mask.width, bottom / mask.height


def draw(scene: Scene, height: int = HEIGHT) -> Drawing:
    """Draw a scene: the same scene always gives the same picture.

    Args:
        scene: What to draw.
        height: Of the picture, in pixels; its width is ``scene.width``, enlarged alike.

    Returns:
        The RGB picture, with a mask and a box for every thing. A thing's mask covers its whole shape, also where a
        later thing hides it.
    """
    large = (scene.width * height * _SUPERSAMPLING // HEIGHT, height * _SUPERSAMPLING)
    image = Image.new("RGB", large)
    _draw_background(image, scene)
    masks: list[Image.Image] = []
    for thing in scene.things:
        mask = Image.new("L", large)
        _PAINTERS[thing.class_word](_Brush(image, mask, thing), thing)
        masks.append(mask.reduce(_SUPERSAMPLING))
    return Drawing(
        image=image.reduce(_SUPERSAMPLING), masks=tuple(masks), boxes=tuple(_find_box(mask) for mask in masks)
    )
