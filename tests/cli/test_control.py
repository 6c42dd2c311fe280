"""`mixofshow sample`: detectors, ControlNets, what is said when one is missing; and regions drawn anew."""

import sys
import types
import warnings
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageChops, ImageOps
from typer.testing import CliRunner

import tiny
from diffusers_mixofshow import cli
from diffusers_mixofshow.errors import ConfigurationError, MissingExtraError, PictureError
from diffusers_mixofshow.sampling.control import CONTROLNETS, Control, make_condition_image, parse_control


# What controlnet_aux 0.0.10 raises: for an unknown name, for one that it has but cannot make, and without mediapipe.
FAILURES = {
    "zoe": ValueError("zoe is not a valid processor id"),
    "dwpose": AttributeError("type object 'DWposeDetector' has no attribute 'from_pretrained'"),
    "mediapipe_face": NameError("name 'mp_face_mesh' is not defined", name="mp_face_mesh"),
    "openpose": FileNotFoundError("not in the local cache.\nTry again."),
}


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(path)
    return path


@pytest.fixture
def detectors(monkeypatch):
    """A stand-in for controlnet_aux whose detectors invert the picture; the names they were made by."""
    made = []

    class Processor:
        def __init__(self, name):
            if name in FAILURES:
                raise FAILURES[name]
            warnings.warn("deprecated", FutureWarning, stacklevel=2)
            made.append(name)

        def __call__(self, picture):
            return ImageOps.invert(picture)

    package, module = types.ModuleType("controlnet_aux"), types.ModuleType("controlnet_aux.processor")
    module.Processor = Processor
    monkeypatch.setitem(sys.modules, "controlnet_aux", package)
    monkeypatch.setitem(sys.modules, "controlnet_aux.processor", module)
    return made


def test_a_control_is_a_detector_a_model_and_a_picture(photo):
    assert parse_control(f"openpose={photo}") == Control("openpose", CONTROLNETS["openpose"], photo)
    assert parse_control(f"zoe@some/net={photo}") == Control("zoe", "some/net", photo)
    for text, word in [
        ("openpose", "form"),
        (f"={photo}", "form"),
        ("openpose=none.png", "no file none.png"),
        (f"zoe={photo}", "no ControlNet is known for 'zoe'"),
    ]:
        with pytest.raises(ConfigurationError, match=word):
            parse_control(text)


def test_a_detector_looks_at_the_picture(photo, detectors):
    plain, seen = (make_condition_image(Control(name, "x", photo)) for name in ("image", "canny"))
    assert plain.getpixel((0, 0)) != seen.getpixel((0, 0))
    assert detectors == ["canny"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zoe", "'zoe': zoe is not a valid"),
        ("dwpose", "this version of controlnet_aux cannot make it"),
        ("mediapipe_face", 'pip install "mediapipe<'),
        ("openpose", "not in the local cache"),
    ],
)
def test_a_detector_that_cannot_run_is_an_error_of_one_line(photo, detectors, name, words):
    with pytest.raises(ConfigurationError, match=words) as error:
        make_condition_image(Control(name, "some/net", photo))
    assert "\n" not in str(error.value)


def test_warnings_of_detectors_are_not_the_users(photo, detectors, recwarn):
    make_condition_image(Control("canny", "x", photo))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("raised", "remedy"),
    [
        (
            RuntimeError("operator torchvision::nms does not exist"),
            "the torchvision that belongs to the installed torch",
        ),
        (AttributeError("module 'mediapipe' has no attribute 'solutions'"), "Uninstall mediapipe"),
    ],
    ids=["torchvision", "mediapipe"],
)
def test_what_breaks_the_import_is_named(photo, monkeypatch, tmp_path, raised, remedy):
    package = tmp_path / "packages" / "controlnet_aux"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise {raised!r}\n")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "controlnet_aux", raising=False)
    monkeypatch.delitem(sys.modules, "controlnet_aux.processor", raising=False)
    with pytest.raises(MissingExtraError, match=remedy):
        make_condition_image(Control("canny", "x", photo))


def test_a_picture_is_turned_upright_and_a_text_is_refused(tmp_path):
    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert make_condition_image(Control("image", "x", tmp_path / "turned.jpg")).size == (20, 40)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(PictureError, match=r"text\.png is no readable picture"):
        make_condition_image(Control("image", "x", tmp_path / "text.png"))


def test_a_missing_extra_is_named(photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    with pytest.raises(MissingExtraError, match=r"diffusers-mixofshow\[controlnet\]"):
        make_condition_image(Control("canny", "x", photo))


def test_a_missing_extra_is_named_before_the_base_is_loaded(photo, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    options = ["--base", str(tmp_path / "no base"), "--prompt", "x", "--control", f"canny={photo}"]
    result = CliRunner().invoke(cli.app, ["sample", *options, "--output", str(tmp_path / "x.png")])
    assert isinstance(result.exception, MissingExtraError)


def test_sample_follows_several_controls(photo, detectors, tmp_path: Path):
    components = tiny.components()
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(tmp_path / "base")
    tiny.controlnet(components["unet"]).save_pretrained(tmp_path / "net")
    options = ["--base", str(tmp_path / "base"), "--prompt", "x", "--steps", "1", "--width", "32", "--height", "32"]

    def drawn(*more):
        output = tmp_path / "x.png"
        result = CliRunner().invoke(cli.app, ["sample", *options, *more, "--overwrite", "--output", str(output)])
        assert result.exit_code == 0, result.exception
        return Image.open(output).tobytes()

    first = ["--control", f"canny@{tmp_path / 'net'}={photo}"]
    second = ["--control", f"image@{tmp_path / 'net'}={photo}"]
    assert len({drawn(), drawn(*first), drawn(*first, *second)}) == 3
    assert detectors == ["canny", "canny"]
    missing = CliRunner().invoke(cli.app, ["sample", *options, "--control", f"image@{tmp_path}={photo}"])
    assert isinstance(missing.exception, ConfigurationError)


def test_refining_draws_regions_anew_and_nothing_else(tmp_path: Path):
    StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False).save_pretrained(tmp_path / "base")
    options = ["sample", "--base", str(tmp_path / "base"), "--prompt", "x", "--steps", "3", "--output"]
    place = ["--width", "32", "--height", "32", "--region", "0.25,0.25,0.6,0.6:a dog"]

    def drawn(name, *more):
        result = CliRunner().invoke(cli.app, [*options, str(tmp_path / name), *place, *more])
        assert result.exit_code == 0, result.exception
        return Image.open(tmp_path / name)

    changed = ImageChops.difference(drawn("plain.png"), drawn("refined.png", "--refine")).getbbox()
    assert changed is not None
    assert changed[0] > 2
    assert changed[3] < 30
    idle = CliRunner().invoke(cli.app, [*options, str(tmp_path / "x.png"), "--refine"])
    assert isinstance(idle.exception, ConfigurationError)
