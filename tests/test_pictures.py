"""Pictures of every kind become upright 8-bit RGB, scaled by what their mode can hold; nothing is guessed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms

import tiny
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora.card import write_samples
from diffusers_mixofshow.errors import MixOfShowWarning, PictureError
from diffusers_mixofshow.pictures import FileContent, clip_to_unit_range, is_picture, read_image, read_picture
from diffusers_mixofshow.pipelines import MixOfShowPipeline
from diffusers_mixofshow.pipelines.refining import refine_regions
from diffusers_mixofshow.regions import Layout
from diffusers_mixofshow.sampling.control import Control, make_condition_image
from diffusers_mixofshow.toyland.reader import to_pixels
from diffusers_mixofshow.training.data import read_photos


RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))
_ORIENTATION = 0x0112


def tiff(values: np.ndarray, bits: int, *, kind: int = 1, photometric: int = 1) -> io.BytesIO:
    """A TIFF of one strip; kind 1 is unsigned, 2 signed, 3 float; photometric 0 has white as zero."""
    height, width = values.shape[0], 64
    mark = ">" if values.dtype.byteorder == ">" else "<"
    data = values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height, 279: len(data)}
    tags |= {339: kind}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    head = (b"MM\0*" if mark == ">" else b"II*\0") + struct.pack(f"{mark}IH", 8, len(tags))
    entries = b"".join(struct.pack(f"{mark}HHII", tag, 4, 1, value) for tag, value in tags.items())
    return io.BytesIO(head + entries + struct.pack(f"{mark}I", 0) + data)


def twelve_bits(values: np.ndarray) -> np.ndarray:
    """Two values of 12 bits in three bytes."""
    high, low = values[:, 0::2].astype(int), values[:, 1::2].astype(int)
    return np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=-1).astype(np.uint8).reshape(8, -1)


def as_png(image: Image.Image) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    buffer.seek(0)
    return buffer


def of_lab(colour: tuple[int, int, int]) -> Image.Image:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    return ImageCms.applyTransform(Image.new("RGB", (8, 8), colour), to_lab)


DEEP: dict[str, Callable[[], object]] = {
    "8 bits": lambda: Image.fromarray((RAMP * 255).astype(np.uint8)),
    "16 bits": lambda: Image.fromarray((RAMP * 65535).astype(np.uint16)),
    "16 bits, PNG": lambda: as_png(Image.fromarray((RAMP * 65535).astype(np.uint16))),
    "16 bits, TIFF": lambda: tiff((RAMP * 65535).astype("<u2"), 16),
    "16 bits, big-endian": lambda: tiff((RAMP * 65535).astype(">u2"), 16),
    "16 bits, signed": lambda: tiff((RAMP * 32767).astype("<i2"), 16, kind=2),
    "16 bits, white is zero": lambda: tiff(((1 - RAMP) * 65535).astype("<u2"), 16, photometric=0),
    "12 bits": lambda: tiff(twelve_bits((RAMP * 4095).astype("<u2")), 12),
    "32 bits": lambda: Image.fromarray((RAMP * (2**31 - 1)).astype(np.int32)),
    "32 bits, TIFF, signed": lambda: tiff((RAMP * (2**31 - 1)).astype("<i4"), 32, kind=2),
    "32 bits, TIFF, unsigned": lambda: tiff((RAMP * (2**32 - 1)).astype("<u4"), 32),
    "16 bits, PGM": lambda: io.BytesIO(b"P5 64 8 65535\n" + (RAMP * 65535).astype(">u2").tobytes()),
    "float": lambda: Image.fromarray(RAMP.astype(np.float32)),
    "float, TIFF": lambda: tiff(RAMP.astype("<f4"), 32, kind=3),
    "float, big-endian": lambda: tiff(RAMP.astype(">f4"), 32, kind=3),
    "float, rounded beyond 1": lambda: Image.fromarray((RAMP * 1.001 - 0.0005).astype(np.float32)),
}


@pytest.mark.parametrize("kind", DEEP)
def test_every_depth_is_scaled_by_its_mode(kind: str) -> None:
    source = DEEP[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.asarray(read_image(source, called="it"))  # type: ignore[arg-type]
    assert found.shape == (8, 64, 3)
    assert np.abs(found[..., 0] / 255 - RAMP).max() < 0.01


@pytest.mark.parametrize(
    ("values", "brightest"), [(RAMP * 255, 1), (RAMP * 400, 2), (RAMP * 0, 0)], ids=["255", "400", "0"]
)
def test_sixteen_bits_with_small_values_are_dark(values: np.ndarray, brightest: int) -> None:
    picture = read_picture(Image.fromarray(values.astype(np.uint16)), called="it")
    assert picture.image.getextrema() == ((0, brightest),) * 3
    assert ["almost black" in remark for remark in picture.remarks] == [True] * int(0 < values.max() < 514)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray((RAMP * 255).astype(np.float32)), ["0.0 to 255.0", "0 to 1"]),
        (Image.fromarray((RAMP * 2 - 1).astype(np.float32)), ["-1.0 to 1.0", "0 to 1"]),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), ["nan", "0 to 1"]),
        (Image.fromarray(np.full((4, 4), np.inf, np.float32)), ["inf", "0 to 1"]),
        (Image.fromarray((RAMP * 255).astype(np.int32)), ["would be black", "8 bits"]),
        (Image.fromarray((RAMP * 65535).astype(np.int32)), ["would be black", "8 bits"]),
        (Image.fromarray((RAMP * 100).astype(np.uint16)), ["would be black", "8 bits"]),
        (Image.fromarray((RAMP * -5).astype(np.int32)), ["below 0", "2147483647"]),
    ],
    ids=["float of 255", "float from -1", "nan", "inf", "32 bits of 8", "32 bits of 16", "16 bits of 100", "below 0"],
)
def test_what_can_be_understood_in_two_ways_is_refused(image: Image.Image, words: list[str]) -> None:
    with pytest.raises(PictureError) as caught:
        read_picture(image, called="a.tif")
    assert [word for word in ["a.tif", *words] if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("image", "tolerance"),
    [
        (Image.new("CMYK", (8, 8), (0, 180, 140, 55)), 60),
        (Image.new("RGB", (8, 8), (200, 30, 60)).convert("YCbCr"), 3),
        (Image.new("RGB", (8, 8), (200, 30, 60)).convert("HSV"), 5),
        (of_lab((200, 30, 60)), 5),
        (Image.new("RGB", (8, 8), (200, 30, 60)).quantize(4), 5),
        (Image.new("RGBa", (8, 8), (200, 30, 60, 255)), 1),
        (Image.new("RGBX", (8, 8), (200, 30, 60, 0)), 1),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_every_colour_space(image: Image.Image, tolerance: int) -> None:
    found = read_picture(image, called="it")
    assert (found.image.mode, found.alpha) == ("RGB", None)
    assert np.abs(np.asarray(found.image)[4, 4] - np.array([200, 30, 60.0])).max() <= tolerance


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa", "P", "L", "1", "RGB"])
def test_what_is_transparent_is_white_and_known(mode: str) -> None:
    if mode in ("P", "L", "1", "RGB"):  # one colour is transparent, as PNG has it
        image = Image.new(mode, (8, 8))
        image.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0
    else:
        image = Image.new(mode, (8, 8), 0)
    picture = read_picture(image, called="it")
    assert picture.image.getpixel((0, 0)) == (255, 255, 255)
    assert picture.alpha is not None
    assert picture.alpha.getextrema() == (0, 0)


def test_a_transparent_grey_of_sixteen_bits_is_refused() -> None:
    image = Image.fromarray((RAMP * 65535).astype(np.uint16))
    image.info["transparency"] = 0
    with pytest.raises(PictureError, match="one transparent grey"):
        read_picture(image, called="it")


def first_pixel(door: str, image: Image.Image, folder: Path) -> tuple[int, ...]:
    """What the first pixel of a picture becomes behind one of the doors of the package, from 0 to 255."""
    if door == "layout":
        return tuple(np.asarray(Layout().draw(image))[0, 0])
    if door == "refining":
        pipe = MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)
        return tuple(np.asarray(refine_regions(pipe, [image], [])[0])[0, 0])
    if door == "card":
        write_samples(folder, {"a prompt": image})
        return tuple(np.asarray(Image.open(folder / "samples" / "0.png"))[0, 0])
    if door == "metric model":
        return tuple((to_pixels([image])[0, :, 0, 0] * 127.5 + 127.5).round().int().tolist())
    image.save(folder / "a.tif")
    if door == "control":
        return tuple(np.asarray(make_condition_image(Control("image", "x", folder / "a.tif")))[0, 0])
    return tuple(np.asarray(read_photos(folder, Concept.from_name("rex", "dog"))[0].image)[0, 0])


@pytest.mark.filterwarnings("ignore:Photos in")
@pytest.mark.parametrize("door", ["layout", "card", "metric model", "control", "training", "refining"])
@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (8, 8), (10, 200, 30, 0)), (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (10, 200, 30, 255)), (10, 200, 30)),
        (Image.new("LA", (8, 8), (10, 0)), (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)), (100, 100, 100)),
        (Image.fromarray(np.full((8, 8), 0.4, np.float32)), (102, 102, 102)),
    ],
    ids=["transparent", "opaque", "grey, transparent", "16 bits", "float"],
)
def test_every_door_reads_alike(tmp_path: Path, door: str, image: Image.Image, expected: tuple[int, ...]) -> None:
    assert first_pixel(door, image, tmp_path) == expected


def test_files_and_pictures_in_memory_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", called="a").size == (10, 20)
    assert read_image(Image.open(tmp_path / "a.jpg"), called="a").size == (10, 20)


def test_frames_of_a_file_are_told(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 200)]
    for ending in ("gif", "tif", "webp"):
        frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
        with pytest.warns(MixOfShowWarning, match="has 2 frames, only the first is used"):
            assert read_image(tmp_path / f"a.{ending}", called="a").getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_text("a text"), "\\(its format is not known\\)$"),
        (lambda path: path.mkdir(), "it is no file"),
        (os.mkfifo, "it is no file"),
    ],
    ids=["empty", "text", "folder", "pipe"],
)
def test_what_is_no_picture_is_named(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(PictureError, match=rf"a\.png is no readable picture .*{words}"):
        read_picture(tmp_path / "a.png", called="a.png")


@pytest.mark.parametrize(
    "make", [lambda path: path.symlink_to("nowhere"), lambda path: None], ids=["broken link", "none"]
)
def test_a_picture_that_is_missing_is_named(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(PictureError, match=r"^a\.png does not exist$"):
        read_picture(tmp_path / "a.png", called="a.png")


@pytest.mark.parametrize(
    "ending", ["png", "jpg", "jpeg", "jfif", "webp", "bmp", "tif", "tiff", "gif", "avif", "heic", "heif"]
)
def test_endings_of_pictures_count_in_any_case(ending: str) -> None:
    assert is_picture(Path(f"a.{ending}"))
    assert is_picture(Path(f"a.b.{ending.upper()}"))
    assert not is_picture(Path(ending))
    assert not is_picture(Path(f"a.{ending}x"))
    assert not is_picture(Path(f"a.{ending}.txt"))


def test_the_content_of_a_file_is_known_by_its_digest(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (10, 20, 30)).save(tmp_path / "a.png")
    content = FileContent(tmp_path / "a.png")
    before = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    (tmp_path / "a.png").unlink()
    assert read_image(content, called="a").getpixel((0, 0)) == (10, 20, 30)
    assert (content.digest, content.path) == (before, tmp_path / "a.png")
    (tmp_path / "b.png").touch()
    with pytest.raises(PictureError, match=r"^b is no readable picture \(the file is empty\)$"):
        read_image(FileContent(tmp_path / "b.png"), called="b")


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF"])
@pytest.mark.parametrize("as_content", [False, True])
def test_photos_of_phones_need_a_package_that_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, as_content: bool
) -> None:
    (tmp_path / name).write_bytes(b"heif")
    source = FileContent(tmp_path / name) if as_content else tmp_path / name
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(PictureError, match=r'^it is HEIC, which needs pillow-heif \(pip install "diffusers-mixofshow'):
        read_image(source, called="it")
    asked = []
    photo = Image.new("RGB", (2, 2), (10, 20, 30))
    opened = SimpleNamespace(to_pillow=lambda: photo)
    module = SimpleNamespace(open_heif=lambda given: (asked.append(given), opened)[1])
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    assert read_image(source, called="it").getpixel((0, 0)) == (10, 20, 30)
    assert asked == [source]


def test_the_depth_behind_a_phones_photo_is_passed_over(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.mpo") as stored:
        assert (stored.format, stored.n_frames) == ("MPO", 2)
    picture = read_picture(tmp_path / "a.mpo", called="a")
    assert picture.remarks == ()
    assert picture.image.getpixel((0, 0))[0] > 200


@pytest.mark.parametrize(
    ("values", "sound"),
    [((0, 1), True), ((-0.0019, 1.0019), True), ((-0.0021, 1), False), ((0, 1.0021), False), ((0.5, 0.5), True)],
)
def test_floats_leave_their_range_by_half_a_step_at_most(values: tuple[float, float], sound: bool) -> None:
    given = np.array([values])
    if sound:
        assert clip_to_unit_range(given, "it").tolist() == [[max(0, values[0]), min(1, values[1])]]
    else:
        with pytest.raises(PictureError, match=f"it has values from {values[0]}"):
            clip_to_unit_range(given, "it")


def test_what_is_half_transparent_is_half_white_and_its_opacity_known() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((0, 0), (0, 100, 0, 51))
    picture = read_picture(image, called="it")
    assert [picture.image.getpixel((x, 0)) for x in (0, 1)] == [(204, 224, 204), (0, 0, 0)]
    assert picture.alpha is not None
    assert (picture.alpha.mode, list(picture.alpha.tobytes())) == ("L", [51, 255])


@pytest.mark.parametrize(
    ("brightest", "said"), [(0.49, "black"), (0.51, "almost"), (1.99, "almost"), (2.01, ""), (0, "")]
)
def test_how_dark_a_picture_may_be(brightest: float, said: str) -> None:
    image = Image.fromarray(np.full((2, 2), brightest / 255, np.float32))
    if said == "black":
        with pytest.raises(PictureError, match=r"it would be black: its values reach 0\.0019 of what its mode \(F\)"):
            read_picture(image, called="it")
    else:
        remarks = read_picture(image, called="it").remarks
        assert [remark.startswith("it is almost black: its values reach 0.0") for remark in remarks] == [True] * bool(
            said
        )  # fmt: skip


def test_a_picture_without_pixels_is_told():
    with pytest.raises(PictureError, match="it has no pixels: it is 0 x 5"):
        read_picture(Image.new("L", (0, 5)), called="it")


def test_a_damaged_tiff_is_told():
    """Whatever byte of its tags is wrong."""
    content = io.BytesIO()
    Image.new("RGB", (12, 12)).save(content, "TIFF", compression="tiff_lzw")
    for place in range(len(content.getvalue())):
        for value in (0, 1, 255):
            damaged = bytearray(content.getvalue())
            damaged[place] = value
            with contextlib.suppress(PictureError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_picture(io.BytesIO(damaged), called="it")
