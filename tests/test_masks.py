"""Masks of every kind say where the concept is; one that could say two things is refused and tells how it was read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.errors import MixOfShowWarning, PictureError, RegionError, TrainingDataError
from diffusers_mixofshow.masks import load_mask, read_alpha, read_mask
from diffusers_mixofshow.regions import Layout, Region
from diffusers_mixofshow.regions.region import read_inside
from diffusers_mixofshow.training.data import read_photos


SQUARE = np.zeros((64, 64), bool)
SQUARE[16:48, 16:48] = True
EIGHT = SQUARE.astype(np.uint8) * 255
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
CONCEPT = Concept.from_name("rex", "dog")


def with_alpha(colour: object, alpha: np.ndarray = EIGHT) -> Image.Image:
    colours = np.broadcast_to(np.asarray(colour, np.uint8), (64, 64, 3))
    return Image.fromarray(np.dstack([colours, alpha.astype(np.uint8)]))


def palette(labels: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(labels.astype(np.uint8)).convert("P")
    image.putpalette([value for colour in colours for value in colour])
    return image


def transparent_palette() -> Image.Image:
    image = palette(SQUARE, (255, 255, 255), (200, 30, 60))
    image.info["transparency"] = 0
    return image


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "black and white": lambda: Image.fromarray(EIGHT),
    "mode 1": lambda: Image.fromarray(SQUARE),
    "labels 0 and 1": lambda: Image.fromarray(SQUARE.astype(np.uint8)),
    "labels 0 and 38": lambda: Image.fromarray(SQUARE.astype(np.uint8) * 38),
    "labels of 16 bits": lambda: Image.fromarray(SQUARE.astype(np.uint16)),
    "labels of 32 bits": lambda: Image.fromarray(SQUARE.astype(np.int32)),
    "16 bits": lambda: Image.fromarray(SQUARE.astype(np.uint16) * 65535),
    "8 bits in 16": lambda: Image.fromarray(SQUARE.astype(np.uint16) * 255),
    "float": lambda: Image.fromarray(SQUARE.astype(np.float32)),
    "red on black": lambda: Image.fromarray(np.dstack([EIGHT, EIGHT * 0, EIGHT * 0])),
    "tinted white": lambda: Image.fromarray(np.dstack([EIGHT, EIGHT // 255 * 250, EIGHT // 255 * 245])),
    "palette, red on black": lambda: palette(SQUARE, (0, 0, 0), (128, 0, 0)),
    "palette, white first": lambda: palette(~SQUARE, (255, 255, 255), (0, 0, 0)),
    "palette, transparent": transparent_palette,
    "CMYK": lambda: Image.fromarray(EIGHT).convert("RGB").convert("CMYK"),
    "YCbCr": lambda: Image.fromarray(EIGHT).convert("RGB").convert("YCbCr"),
    "HSV": lambda: Image.fromarray(EIGHT).convert("RGB").convert("HSV"),
    "white, alpha": lambda: with_alpha(255),
    "brush, black on nothing": lambda: with_alpha(0),
    "brush of opacity 100": lambda: with_alpha(0, EIGHT // 255 * 100),
    "faded background": lambda: with_alpha(90, np.where(SQUARE, 255, 128)),
    "cut-out, its colour kept below": lambda: with_alpha(200),
    "cut-out of a photo": lambda: with_alpha(NOISE),
    "cut-out, nothing below": lambda: with_alpha(NOISE * SQUARE[..., None]),
    "alpha like the white": lambda: with_alpha(EIGHT[..., None]),
    "grey and alpha": lambda: Image.fromarray(np.dstack([EIGHT * 0 + 255, EIGHT])),
    "multiplied by alpha": lambda: with_alpha(255).convert("RGBa"),
    "alpha of 1": lambda: with_alpha(255, SQUARE),
    "opaque everywhere": lambda: with_alpha(EIGHT[..., None], EIGHT * 0 + 255),
    "nearly opaque": lambda: with_alpha(EIGHT[..., None], np.where(SQUARE, 255, 250)),
    "half transparent everywhere": lambda: with_alpha(EIGHT[..., None], EIGHT * 0 + 128),
}


@pytest.mark.filterwarnings("ignore:Photos in")
@pytest.mark.parametrize("kind", PICTURES)
def test_regions_layouts_and_training_read_the_same_square(tmp_path: Path, kind: str) -> None:
    mask = PICTURES[kind]()
    assert read_inside(mask).numpy().tolist() == SQUARE.tolist()
    if mask.mode in ("HSV", "RGBa", "YCbCr"):  # in memory only
        return
    file = "1.tif" if mask.mode in ("F", "I", "CMYK") else "1.png"
    (tmp_path / "masks").mkdir()
    Image.fromarray(NOISE).save(tmp_path / "1.jpg")
    mask.save(tmp_path / "masks" / file)
    (photo,) = read_photos(tmp_path, CONCEPT)
    assert photo.mask is not None
    assert (np.array(photo.mask) > 127).tolist() == SQUARE.tolist()
    assert photo.mask.getextrema()[1] >= 245
    content = '{"format": "mixofshow-layout", "version": 1, "regions": [{"prompt": "a", "mask": "masks/%s"}]}'
    (tmp_path / "layout.json").write_text(content % file)
    (region,) = Layout.load(tmp_path / "layout.json")
    assert region.mask is not None
    assert read_inside(region.mask).numpy().tolist() == SQUARE.tolist()


ARRAYS: dict[str, object] = {
    "booleans": SQUARE,
    "uint8": EIGHT,
    "labels": SQUARE.astype(np.int64),
    "labels 0 and 7": SQUARE.astype(np.int32) * 7,
    "int64 of 255": EIGHT.astype(np.int64),
    "uint16": SQUARE.astype(np.uint16) * 65535,
    "big-endian": SQUARE.astype(">u2") * 65535,
    "big-endian float": SQUARE.astype(">f4"),
    "half": SQUARE.astype(np.float16),
    "turned around": EIGHT[::-1, ::-1],
    "channel last": EIGHT[..., None],
    "channels first": EIGHT[None, None],
    "tensor": torch.from_numpy(EIGHT),
    "bfloat16": torch.from_numpy(SQUARE).bfloat16(),
    "with gradient": torch.from_numpy(SQUARE).float().requires_grad_(),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_and_tensors(kind: str) -> None:
    region = Region("a", mask=ARRAYS[kind])  # type: ignore[arg-type]
    assert region.mask is not None
    assert read_inside(region.mask).numpy().tolist() == SQUARE.tolist()


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 3), (3, 1), (1, 3, 1), (1, 1)])
def test_a_mask_may_be_one_pixel_high_or_wide(shape: tuple[int, ...]) -> None:
    line = np.resize(np.array([1, 0, 1]), shape)
    tall_and_wide = [size for size in shape if size == 3] or [1]
    region = Region("a", mask=line)
    assert region.mask is not None
    inside = read_inside(region.mask).numpy()
    assert sorted(inside.shape) == sorted([1, *tall_and_wide])
    assert inside.flatten().tolist() == line.flatten().astype(bool).tolist()


@pytest.mark.parametrize("place", [(0, 0), (17, 3), (63, 63)])
@pytest.mark.parametrize("colour", [(255, 255, 255), (1, 1, 1), (0, 0, 128)])
def test_one_pixel_is_a_mask(place: tuple[int, int], colour: tuple[int, int, int]) -> None:
    image = Image.new("RGB", (64, 64))
    image.putpixel(place, colour)
    expected = np.zeros((64, 64), bool)
    expected[place[1], place[0]] = True
    assert read_mask(image, called="it").inside.tolist() == expected.tolist()


def greys(count: int, brightest: int) -> np.ndarray:
    """So many values, evenly from 0 on."""
    return np.resize(np.rint(np.linspace(0, brightest, count)).astype(np.uint8), (64, 64))


@pytest.mark.parametrize(
    ("count", "brightest", "told"),
    [
        (3, 200, "3 values, none of them white"),
        (16, 200, "16 values, none of them white"),
        (17, 200, ""),  # more than there are labels
        (16, 239, "16 values, none of them white"),  # 0.937 of white
        (16, 240, ""),
        (2, 7, ""),
        (17, 127, "nowhere brighter than 0.5 "),
        (17, 128, ""),
    ],
)
def test_few_greys_below_white_are_labels_and_many_are_soft_edges(count: int, brightest: int, told: str) -> None:
    values = greys(count, brightest)
    assert len(np.unique(values)) == count
    for mask in (values, Image.fromarray(values)):
        if told:
            with pytest.raises(PictureError, match=told):
                read_mask(mask, called="it")
        else:
            read = read_mask(mask, called="it").values
            assert np.array_equal(read, values > 0 if count == 2 else values / 255)


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


@pytest.mark.parametrize(
    "mask",
    [
        RAMP,
        (RAMP * 255).round().astype(np.uint8),
        (RAMP * 65535).astype(np.uint16),
        Image.fromarray((RAMP * 255).round().astype(np.uint8)),
        Image.fromarray((RAMP * 65535).astype(np.uint16)),
        Image.fromarray((RAMP * (2**31 - 1)).astype(np.int32)),
        Image.fromarray(RAMP.astype(np.float32)),
        with_alpha(0, (RAMP * 255).round()),
        Image.fromarray((RAMP[..., None] * [255, 250, 245]).round().astype(np.uint8)),
    ],
    ids=["float array", "uint8", "uint16", "L", "I;16", "I", "F", "alpha", "yellowed"],
)
def test_soft_edges_keep_their_values(mask: object) -> None:
    found = read_mask(mask, called="it")  # type: ignore[arg-type]
    assert np.abs(found.values - RAMP).max() < 0.003
    assert np.abs(np.asarray(found.grey) / 255 - RAMP).max() < 0.005
    assert found.inside.mean() == 0.5


def three(a: int, b: int, c: int) -> np.ndarray:
    """Three values in stripes."""
    return np.repeat(np.array([a, b, c], np.uint8), 22)[None, :64].repeat(64, axis=0)


AMBIGUOUS: dict[str, tuple[object, str]] = {
    "three labels": (Image.fromarray(three(0, 1, 2)), "3 values, none of them white"),
    "three labels, one large": (Image.fromarray(three(0, 12, 130)), "3 values, none of them white"),
    "labels without 0": (Image.fromarray(np.where(SQUARE, 2, 1).astype(np.uint8)), "2 values, none of them white"),
    "three labels of 16 bits": (Image.fromarray(three(0, 1, 2).astype(np.uint16)), "3 values, none of them white"),
    "array of three labels": (three(0, 1, 2), "3 values, none of them white"),
    "palette of three labels": (palette(three(0, 1, 2), (0, 0, 0), (128, 0, 0), (0, 128, 0)), "several colours"),
    "two colours, none black": (palette(SQUARE, (0, 0, 255), (255, 0, 0)), "several colours"),
    "one colour everywhere": (Image.new("RGB", (64, 64), "red"), "several colours|one colour"),
    "a photo": (Image.fromarray(NOISE), "several colours"),
    "dark greys": (Image.fromarray((RAMP * 100).astype(np.uint8)), "nowhere brighter than 0.3"),
    "8 bits in 16": (Image.fromarray((RAMP * 255).astype(np.uint16)), "nowhere brighter"),
    "8 bits in 32": (Image.fromarray((RAMP * 255).astype(np.int32)), "nowhere brighter"),
    "float of 255": (Image.fromarray((RAMP * 255).astype(np.float32)), "0.0 to 255.0; expected 0 to 1"),
    "float array of 255": (RAMP * 255, "0.0 to 255.0; expected 0 to 1"),
    "labels through a tensor of 0 to 1": (SQUARE / 255.0, "nowhere brighter"),
    "no number": (np.where(SQUARE, np.nan, 0.0), "nan"),
    "ignored label": (np.where(SQUARE, 1, -1), "-1 to 1; expected 0 to 255"),
    "too large": (np.where(SQUARE, 300, 0), "0 to 300; expected 0 to 255"),
    "colours": (NOISE, r"shape \(64, 64, 3\); expected \(height, width\)"),
    "complex": (SQUARE.astype(complex), "complex128"),
    "white and alpha": (with_alpha(np.where(RAMP < 0.5, 0, 255)[..., None]), "either what is white or what is opaque"),
    "transparent everywhere": (with_alpha(EIGHT[..., None], EIGHT * 0), "transparent everywhere"),
    "a faint brush": (with_alpha(0, RAMP * 100), "nowhere brighter"),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_what_could_say_two_things_is_refused(kind: str) -> None:
    mask, words = AMBIGUOUS[kind]
    with pytest.raises(PictureError, match=words):
        read_mask(mask, called="it")  # type: ignore[arg-type]
    with pytest.raises(RegionError, match=words):
        Region("a", mask=mask)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Photos in")
@pytest.mark.parametrize(
    ("alpha", "share"),
    [
        (EIGHT, 0.25),
        (EIGHT // 255 * 140, 0.25),
        (np.where(SQUARE, 255, 128), 0.25),
        (np.where(SQUARE, 255, 250), None),
        (EIGHT * 0 + 200, None),
        (EIGHT * 0, None),
    ],
    ids=["cut-out", "pale", "faded background", "nearly opaque", "one opacity", "nothing"],
)
def test_a_photos_own_alpha(tmp_path: Path, alpha: np.ndarray, share: float | None) -> None:
    with_alpha(NOISE, alpha).save(tmp_path / "1.png")
    found = read_photos(tmp_path, CONCEPT)[0].mask
    assert (found and np.asarray(found).mean() / 255) == share


def test_a_photo_that_can_hardly_be_seen_is_a_defect(tmp_path: Path) -> None:
    with_alpha(NOISE, RAMP * 100).save(tmp_path / "1.png")
    with pytest.raises(TrainingDataError, match=r"the alpha channel of 1\.png is nowhere brighter than 0\.39"):
        read_photos(tmp_path, CONCEPT)


def test_an_ambiguous_mask_of_a_photo_is_a_defect(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    Image.fromarray(NOISE).save(tmp_path / "1.jpg")
    Image.fromarray(three(0, 1, 2)).save(tmp_path / "masks" / "1.png")
    with pytest.raises(TrainingDataError, match=r"masks/1\.png has 3 values, none of them white"):
        read_photos(tmp_path, CONCEPT)


def test_masks_are_turned_upright_and_frames_are_told(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the photo's top is at the right
    top = np.zeros((32, 64), np.uint8)
    top[:, :32] = 255
    Image.fromarray(top).save(tmp_path / "a.jpg", exif=exif, quality=95)
    inside = read_mask(tmp_path / "a.jpg", called="a").inside
    assert inside.shape == (64, 32)
    assert inside.mean(axis=1)[[0, -1]].tolist() == [1, 0]
    frames = [Image.fromarray(EIGHT), Image.fromarray(255 - EIGHT)]
    frames[0].save(tmp_path / "m.gif", save_all=True, append_images=frames[1:])
    content = '{"format": "mixofshow-layout", "version": 1, "regions": [{"prompt": "a", "mask": "m.gif"}]}'
    (tmp_path / "layout.json").write_text(content, encoding="utf-16")
    with pytest.warns(MixOfShowWarning, match=r"m\.gif has 2 frames"):
        (region,) = Layout.load(tmp_path / "layout.json")
    assert region.mask is not None
    assert read_inside(region.mask).numpy().tolist() == SQUARE.tolist()


def coloured(difference: int) -> Image.Image:
    """Grey stripes of many shades, one channel lower by so much."""
    greys = np.dstack([(RAMP * 255).round()] * 3)
    greys[..., 2] = (greys[..., 2] - difference).clip(0)
    return Image.fromarray(greys.astype(np.uint8))


def values(count: int, high: int) -> Image.Image:
    """So many shades from 0 to the highest."""
    return Image.fromarray(np.linspace(0, high, count).round().astype(np.uint8)[None].repeat(4, axis=0))


def two_shades(low: int, high: int) -> Image.Image:
    """A cut-out whose own colours are two greys."""
    return with_alpha(np.where(RAMP < 0.5, low, high)[..., None])


BOUNDS: dict[str, tuple[Image.Image, Image.Image]] = {
    "a tint is no colour up to 16 of 255": (coloured(16), coloured(17)),
    "soft edges have more than 16 values": (values(17, 200), values(16, 200)),
    "labels are no brighter than .94": (values(16, 240), values(16, 239)),
    "black ends at 64": (two_shades(65, 255), two_shades(64, 255)),
    "white begins at 192": (two_shades(0, 191), two_shades(0, 192)),
    "inside is above one half": (values(40, 128), values(40, 127)),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_where_a_mask_begins_to_be_ambiguous(bound: str) -> None:
    sound, ambiguous = BOUNDS[bound]
    assert read_mask(sound, called="it").values.max() > 0.5
    with pytest.raises(PictureError):
        read_mask(ambiguous, called="it")


def test_an_alpha_channel_that_is_nowhere_below_240_says_nothing() -> None:
    for least, share in ((239, 0.25), (240, None)):
        found = read_alpha(Image.fromarray(np.where(SQUARE, 255, least).astype(np.uint8)), called="it")
        assert (None if found is None else found.values.mean()) == share


def test_the_bounds_of_whole_numbers() -> None:
    for dtype, largest in ((np.uint8, 255), (np.uint16, 65535), (np.int16, 255), (np.int64, 255)):
        assert read_mask(SQUARE.astype(dtype) * dtype(largest), called="it").inside.tolist() == SQUARE.tolist()
        ramp = (RAMP * largest).round().astype(dtype)
        assert np.abs(read_mask(ramp, called="it").values - RAMP).max() < 0.003
    for array in (SQUARE.astype(np.int64) * 256, SQUARE.astype(np.uint32) * 65535, -SQUARE.astype(np.int8)):
        with pytest.raises(PictureError, match="expected 0 to 255"):
            read_mask(array, called="it")


def test_remarks_on_a_mask_become_one_warning_each(tmp_path: Path) -> None:
    Image.fromarray(EIGHT).save(tmp_path / "m.gif", save_all=True, append_images=[Image.fromarray(255 - EIGHT)])
    with pytest.warns(MixOfShowWarning, match="mine has 2 frames") as caught:
        found = load_mask(tmp_path / "m.gif", called="mine")
    assert len(caught) == len(found.remarks) == 1
    assert found.inside.tolist() == SQUARE.tolist()
