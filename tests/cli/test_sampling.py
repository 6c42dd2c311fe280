"""`mixofshow sample`: what every option does to the picture, what cannot be, and what a dry run tells."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cli.commands import named_in, options_of
from diffusers_mixofshow import cli
from diffusers_mixofshow.base_models import list_devices
from diffusers_mixofshow.cli.region_text import parse_isolation, parse_region
from diffusers_mixofshow.errors import MixOfShowError, MixOfShowWarning, RegionError
from diffusers_mixofshow.notes import read_note
from diffusers_mixofshow.regions import Isolation, Region


LEFT, RIGHT = "0,0,0.5,1:a <rex>", "0.5,0,1,1:a cat"
REGIONS = ("--region", LEFT, "--region", RIGHT)
DRAWN: dict[tuple[str, ...], np.ndarray] = {}
TOLD: dict[tuple[str, ...], dict[str, object]] = {}


@pytest.fixture
def draw(place, monkeypatch):
    """Draws with options, and reads the picture as an array; the same options are drawn once."""
    monkeypatch.chdir(place)

    def drawn(*options: str, output: str = "x.png", seen: str | None = None) -> np.ndarray:
        if seen is None and options in DRAWN:
            return DRAWN[options]
        common = [
            "--base",
            "base",
            "--concepts",
            "rex",
            "--prompt",
            "a <rex> here",
            "--steps",
            "2",
            "--output",
            output,
            "--overwrite",
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of regions that leave nothing to the global prompt
            result = CliRunner().invoke(cli.app, ["sample", *common, "--width", "32", "--height", "32", *options])
        if result.exception is not None:
            raise result.exception
        with Image.open(seen or output) as picture:
            DRAWN[options] = np.asarray(picture).astype(int)
        note = read_note(Path(seen or output))
        read = {"sampler": note["sampler"], "pictures": note["pictures"], "drawn in": note["dtype"]}
        TOLD[options] = note["layout"] | note["sample"] | read
        return DRAWN[options]

    return drawn


IMAGE = ("--image", "photo.png")
CONTROL = ("--control", "image@net=photo.png")
ADAPTER = ("--adapter", "image@adapter=photo.png")


CHANGES = [
    ((), ("--prompt", "a cat"), "prompt"),
    ((), ("--seed", "1"), "seed"),
    ((), ("--steps", "3"), "steps"),
    ((), ("--guidance", "2"), "guidance"),
    ((), ("--negative-prompt", "blue"), "negative_prompt"),
    ((), ("--lora-scale", "0.5"), "lora_scale"),
    # one for each instead of one for all
    (("--concepts", "tom", "--lora-scale", "0.5"), ("--lora-scale", "1"), "lora_scale"),
    ((), ("--dtype", "bfloat16"), "dtype, drawn in"),
    ((), ("--region", LEFT), "regions, draft"),
    ((), ("--region", "mask=left.png:a cat"), "regions, draft"),
    ((), ("--layout", "masked.json"), "regions, draft"),
    ((), IMAGE, "image, strength, pictures"),
    ((), CONTROL, "control, control_scale, pictures"),
    ((), ADAPTER, "adapter, control_scale, pictures"),
    (("--region", "mask=left.png:a cat"), ("--region", "mask=corner.png,order=1:a dog"), "regions"),
    (REGIONS, ("--isolation",), "isolation, isolation_steps"),
    ((*REGIONS, "--isolation"), ("--isolation-steps", "0,0.5"), "isolation_steps"),
    ((*REGIONS, "--isolation"), ("--isolation-scales", "1"), "isolation_scales"),
    (("--region", "0,0,0.5,0.5:a cat"), ("--refine",), "refine"),
    (("--region", LEFT), ("--no-draft",), "draft"),
    ((*ADAPTER, "--region", LEFT), ("--draft",), "draft"),
    ((*IMAGE, "--steps", "5"), ("--strength", "0.5"), "strength"),
    (IMAGE, ("--image", "other.png"), "image, pictures"),
    (IMAGE, ("--mask", "left.png"), "mask, strength, pictures"),
    ((*IMAGE, "--mask", "left.png"), ("--mask", "corner.png"), "mask, pictures"),
    ((*IMAGE, "--mask", "left.png"), ("--strength", "0.5"), "strength"),
    (IMAGE, ("--region", LEFT), "regions, draft"),
    ((*IMAGE, "--mask", "left.png"), ("--region", LEFT), "regions, draft"),
    (CONTROL, ("--control-scale", "0.5"), "control_scale"),
    (CONTROL, CONTROL, "control, control_scale"),
    ((*CONTROL, *CONTROL, "--control-scale", "1"), ("--control-scale", "0.5"), "control_scale"),
    (ADAPTER, ("--control-scale", "0.5"), "control_scale"),
    (ADAPTER, ADAPTER, "adapter, control_scale"),
    (ADAPTER, ("--region", LEFT), "regions, draft"),
]
"""Options, those that are added to them, and all that the picture tells differently then."""


@pytest.mark.parametrize(
    ("before", "more", "told"),
    CHANGES,
    ids=lambda options: options if isinstance(options, str) else " ".join(options).replace("--", ""),
)
def test_every_option_changes_the_picture(draw, before, more, told) -> None:
    one, other = draw(*before), draw(*before, *more)
    assert one.shape == other.shape
    assert (one != other).any()
    notes = TOLD[before], TOLD[(*before, *more)]
    changed = {name for name in {*notes[0], *notes[1]} if notes[0].get(name) != notes[1].get(name)}
    assert changed == set(told.split(", "))


def test_every_option_of_sample_is_in_a_table() -> None:
    sizes = {"--width", "--height"}  # test_a_picture_to_start_from_decides_the_size_that_is_not_asked_for
    places = {"--base", "--device"}  # test_what_cannot_be_is_one_error_that_names_all_of_it
    result = {"--output", "--count", "--overwrite", "--dry-run", "--json"}  # test_options_of_the_result
    changing = named_in(*((*before, *more) for before, more, _ in CHANGES))
    assert changing | sizes | places | result == options_of("sample")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("--region", LEFT), ("--region", "mask=left.png:a <rex>")),
        (("--layout", "masked.json"), REGIONS),
        ((), ("--lora-scale", "1", "--device", "cpu", "--dtype", "float32", "--negative-prompt", "")),
        (("--region", LEFT), ("--region", LEFT, "--draft")),
        (("--prompt", "a cat"), ("--prompt", "a cat", "--no-draft")),
        *(((*way, "--region", LEFT), (*way, "--region", LEFT, "--no-draft")) for way in (IMAGE, CONTROL, ADAPTER)),
        ((*REGIONS, "--isolation"), (*REGIONS, "--isolation", "--isolation-steps", "0,1")),
        ((*REGIONS, "--isolation"), (*REGIONS, "--isolation", "--isolation-scales", "1,2")),
        (IMAGE, (*IMAGE, "--strength", "0.8")),
        ((*CONTROL, *CONTROL, "--control-scale", "0.5"), (*CONTROL, *CONTROL, *("--control-scale", "0.5") * 2)),
    ],
    ids=lambda options: " ".join(options).replace("--", ""),
)
def test_what_is_said_in_two_ways_is_the_same_picture(draw, one, other) -> None:
    assert np.array_equal(draw(*one), draw(*other))


def test_inpainting_draws_where_the_mask_is_white(draw) -> None:
    photo = np.asarray(Image.open("photo.png")).astype(int)
    seen = np.asarray(Image.open("left.png")) > 0
    parted = [draw(*IMAGE, "--mask", "left.png", "--seed", str(seed)) for seed in (0, 1)]
    difference = np.abs(parted[0] - parted[1]).sum(axis=2)
    assert difference[:, :12].mean() > 4 * difference[:, 20:].mean()
    assert photo.shape == parted[0].shape
    assert seen[:, :16].all()


def test_several_pictures_of_each_way_differ_by_their_seeds(draw) -> None:
    for options in (IMAGE, (*IMAGE, "--mask", "left.png"), (*ADAPTER, *ADAPTER)):
        draw(*options, "--count", "2", "--seed", "3", output="two.png", seen="two-1.png")
        first, second = (np.asarray(Image.open(f"two-{number}.png")).astype(int) for number in (0, 1))
        assert (first != second).any()
        assert np.abs(draw(*options, "--seed", "4") - second).max() <= 2


@pytest.mark.parametrize(
    ("asked", "size"),
    [((), (40, 24)), (("--width", "80"), (80, 48)), (("--height", "48"), (80, 48)),
     (("--width", "32", "--height", "16"), (32, 16))],
)  # fmt: skip
def test_a_picture_to_start_from_decides_the_size_that_is_not_asked_for(place, monkeypatch, asked, size) -> None:
    monkeypatch.chdir(place)
    Image.new("RGB", (41, 25), "red").save("odd.png")
    Image.new("L", (20, 12), 255).save("all.png")
    for more in ((), ("--mask", "all.png")):
        options = ["sample", "--base", "base", "--prompt", "x", "--steps", "2", "--image", "odd.png", *asked, *more]
        options += ["--output", "sized.png", "--overwrite"]
        assert CliRunner().invoke(cli.app, options, catch_exceptions=False).exit_code == 0
        assert Image.open("sized.png").size == size


def test_a_picture_as_a_camera_takes_it_is_told_to_be_large(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    Image.new("RGB", (1600, 900)).save("large.png")
    asked = ["sample", "--base", "no/base", "--prompt", "x", "--image", "large.png", "--dry-run", "--json"]
    with pytest.warns(MixOfShowWarning, match=r"large\.png is drawn at its own size of 1600 x 896 pixels.*--width"):
        told = json.loads(CliRunner().invoke(cli.app, asked, catch_exceptions=False).stdout)
    assert told["size"] == "1600 x 896 pixels"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = json.loads(CliRunner().invoke(cli.app, [*asked, "--width", "512"], catch_exceptions=False).stdout)
    assert told["size"] == "512 x 288 pixels"


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--isolation"], ["--isolation without any region"]),
        (["--isolation-steps", "0,1", "--isolation-scales", "2"],
         ["--isolation-steps and --isolation-scales without --isolation"]),
        (["--draft"], ["--draft without any region"]),
        ([*IMAGE, "--region", LEFT, "--draft"], ["--draft and --image, which starts from a picture"]),
        (["--region", LEFT, "--isolation", "--isolation-steps", "half"], ["expected fractions"]),
        (["--region", LEFT, "--isolation", "--isolation-scales", "3"], ["powers of two"]),
        (["--region", LEFT, "--isolation", "--isolation-steps", "0.5,0.5"], ["it never holds"]),
        (["--mask", "left.png"], ["--mask without --image"]),
        (["--strength", "0.5"], ["--strength without --image"]),
        (["--image", "none.png", "--mask", "base"], ["--image none.png, which is no file", "--mask base"]),
        ([*IMAGE, "--strength", "1.5"], ["--strength 1.5, expected"]),
        ([*IMAGE, "--strength", "0"], ["--strength 0.0, expected"]),
        ([*IMAGE, "--strength", "nan"], ["--strength nan, expected"]),
        ([*IMAGE, "--strength", "0.1", "--steps", "5"], ["--strength 0.1 of 5 steps, which is less than one step"]),
        ([*IMAGE, *CONTROL, *ADAPTER], ["--image and --control and --adapter at once"]),
        (["--control-scale", "1"], ["--control-scale without --control or --adapter"]),
        ([*CONTROL, "--control-scale", "1", "--control-scale", "1"], ["--control-scale 2 times for 1"]),
        ([*CONTROL, "--control-scale", "inf"], ["--control-scale inf, expected"]),
        (["--lora-scale", "1"], ["--lora-scale without --concepts"]),
        (["--concepts", "rex", *("--lora-scale", "1") * 2], ["--lora-scale 2 times for 1 --concepts"]),
        (["--concepts", "rex", "--concepts", "rex"], ["--concepts rex twice"]),
        (["--control", "zoe=photo.png", "--control", "canny"], ["is known for 'zoe'", "Control 'canny': it is not"]),
        (["--adapter", "zoe=photo.png"], ["no T2I-Adapter is known for 'zoe'"]),
        (["--adapter", "image@base=photo.png"], ["The T2I-Adapter 'base' cannot be loaded"]),
        (["--device", "nowhere"], ["--device nowhere", "doctor"]),
        (["--device", "cuda:77"], ["--device cuda:77", f"a device that it has ({list_devices()});", "doctor"]),
        (["--base", "toyland", *IMAGE, "--mask", "left.png"], ["4 or 9 input channels", "that of toyland has 8"]),
        (["--region", "3:x", "--region", "0,0,2,1:y", "--region", "mask=none.png:z"],
         ["Region '3:x'", "Region 'y': its box", "none.png does not exist"]),
        (["--mask", "left.png", "--isolation", "--strength", "2", "--width", "9", "--output", "x.gif", "--refine"],
         ["--mask without", "--isolation without", "--strength without", "width of 9", "--output x.gif", "--refine"]),
        (["--layout", "photo.png"], ["photo.png does not tell how it was made"]),
        (["--image", "masked.json"], ["masked.json is no readable picture"]),
    ],
    ids=lambda each: " ".join(each)[:60] if each and each[0].startswith("--") else None,
)  # fmt: skip
def test_what_cannot_be_is_one_error_that_names_all_of_it(place, monkeypatch, options, messages) -> None:
    monkeypatch.chdir(place)
    bare = ["sample", "--prompt", "x", "--steps", "2", "--output", "never.png"]
    base = [] if "--base" in options else ["--base", "base"]
    result = CliRunner().invoke(cli.app, [*bare, *base, *options])
    assert isinstance(result.exception, MixOfShowError), result.output
    for message in messages:
        assert message in str(result.exception)
    assert not Path("never.png").exists()


def test_a_dry_run_tells_the_plan_and_loads_nothing(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    asked = ["sample", "--base", "no/base", "--concepts", "rex", "--prompt", "x", "--dry-run", "--json"]
    more = ["--region", LEFT, "--isolation", "--isolation-steps", "0,0.5", "--isolation-scales", "2,4"]
    more += [
        "--output",
        "dry.png",
        "--lora-scale",
        "0.7",
        *IMAGE,
        "--strength",
        "0.5",
        "--device",
        "cuda:3",
        "--dtype",
        "float16",
    ]
    told = json.loads(CliRunner().invoke(cli.app, [*asked, *more], catch_exceptions=False).stdout)
    expected = {
        "way": "image to image from photo.png, strength 0.5",
        "isolation": "from 0 to 0.5 of the steps, maps of 2, 4 cells",
        "strength of the updates": "0.7",
        "device": "cuda:3",
        "dtype": "float16",
        "U-Net runs": "10, each on a batch of 2",
        "size": "32 x 32 pixels",
        "seeds": "0",
    }
    assert expected.items() <= told.items()
    followed = ["--adapter", "image@some/net=photo.png", "--control-scale", "0.6"]
    told = json.loads(
        CliRunner().invoke(cli.app, [*asked, *followed, "--output", "dry.png"], catch_exceptions=False).stdout
    )
    assert told["way"] == "text to image under T2I-Adapter some/net on photo.png, strength 0.6"
    assert not Path("dry.png").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,0,0.5,1,weight=0.5,feather=0.1:x", Region("x", box=(0, 0, 0.5, 1), weight=0.5, feather=0.1)),
        ("order=2, start=0.1 ,end=0.9,0,0,1,1: x, y", Region("x, y", box=(0, 0, 1, 1), order=2, start=0.1, end=0.9)),
        ("0,0,1,1,guidance_scale=3,control_scale=0,rounding=inward:x=y:z",
         Region("x=y:z", box=(0, 0, 1, 1), guidance_scale=3, control_scale=0, rounding="inward")),
        ("0,0,1,1:", Region("", box=(0, 0, 1, 1))),
    ],
)  # fmt: skip
def test_settings_of_a_region_stand_before_its_prompt(text, expected) -> None:
    assert vars(parse_region(text)) == vars(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask=left.png", "it has no prompt"),
        ("0,0,1,1,mask=left.png:x", "it has 4 numbers; a box has four, and mask= takes the place of a box"),
        ("weight=1:x", "it has 0 numbers; a box has four"),
        ("0.5,0.2,1:x", "it has 3 numbers; a box has four"),
        ("0,0,1,1", "it has no prompt"),
        ("0,0,1,1,wieght=1:x", "it has wieght; known are mask, weight"),
        ("0,0,1,1,weight=much:x", "could not convert"),
        ("0,0,1,1,order=0.5:x", "order|invalid literal"),
        ("0,0,1,1,prompt=y:x", "it has prompt"),
        ("0,0,1,1,weight=-1:x", "its weight is -1"),
        ("0,0,1,1,rounding=up:x", "its rounding is 'up'"),
        ("mask=:x", "readable|no file|directory"),
        ("mask=C:left.png:x", "C:left.png does not exist"),
        ("mask=black.png:x", "its mask has no pixel inside"),
    ],
)
def test_a_region_that_cannot_be_says_why(place, monkeypatch, text, message) -> None:
    monkeypatch.chdir(place)
    Image.new("L", (4, 4)).save("black.png")
    with pytest.raises(MixOfShowError, match=message):
        parse_region(text)


def test_isolation_is_read_as_the_class_takes_it() -> None:
    assert parse_isolation(None, None) == Isolation()
    assert parse_isolation("0.1, 0.5", "2,4") == Isolation(start=0.1, end=0.5, scales=(2, 4))
    for steps in ("0.5", "0,0.5,1", "1,0"):
        with pytest.raises(RegionError):
            parse_isolation(steps, None)


def test_toylands_own_adapter_places_things(tmp_path, monkeypatch) -> None:
    from diffusers_mixofshow import toyland

    monkeypatch.chdir(tmp_path)
    toyland.draw_places([(0.55, 0.3, 0.95, 0.95)], 64, 64).save("right.png")
    toyland.draw_places([(0.05, 0.3, 0.45, 0.95)], 64, 64).save("left.png")
    drawn = []
    for name in ("left", "right"):
        options = [
            "--base",
            "toyland",
            "--prompt",
            "a red vase in the snow",
            "--steps",
            "8",
            "--output",
            f"on the {name}.png",
        ]
        more = ["--adapter", f"image@toyland={name}.png"]
        assert CliRunner().invoke(cli.app, ["sample", *options, *more], catch_exceptions=False).exit_code == 0
        pixels = np.asarray(Image.open(f"on the {name}.png")).astype(int)
        drawn.append(pixels[..., 0] - pixels[..., 2])  # red things are red
    assert drawn[0][:, :32].mean() > drawn[0][:, 32:].mean()
    assert drawn[1][:, :32].mean() < drawn[1][:, 32:].mean()


def test_the_command_line_draws_what_the_demo_draws(tmp_path, monkeypatch) -> None:
    from diffusers_mixofshow import toyland
    from diffusers_mixofshow.concepts import Concept
    from diffusers_mixofshow.demo.sampling import draw_layout, sample_all
    from diffusers_mixofshow.demo.settings import DemoConcept, DemoSettings
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.families.layers import cross_attention_layers
    from diffusers_mixofshow.pipelines import MixOfShowPipeline

    monkeypatch.chdir(tmp_path)
    pipe = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)
    layers = cross_attention_layers(pipe.unet)
    class_words = {"bobo": "critter", "kiki": "critter", "rex": "dog"}
    concepts = tuple(Concept.from_name(name, word) for name, word in class_words.items())
    noise = torch.Generator().manual_seed(0)
    rows = {token: torch.randn(len(layers), 128, generator=noise) for each in concepts for token in each.tokens}
    EDLoRA(concepts=concepts, embeddings=rows, lora={}, base_model="toyland", layers=layers).save_pretrained("fused")

    chosen = [
        DemoConcept(name=name, kind="pet", class_word=word, folder=tmp_path) for name, word in class_words.items()
    ]
    settings = DemoSettings(folder=tmp_path, concepts=tuple(class_words), pictures=1, together=1, steps=2)
    single = {f"single/{name}": Path("fused") for name in class_words}
    drawn = sample_all(pipe, chosen, {**single, "average": Path("fused"), "fused": Path("fused")}, settings, print)

    draw_layout(list(class_words.values())).save("places.png")
    called = [f"a <{name}> {word}" for name, word in class_words.items()]
    options = ["--concepts", "fused", "--width", "96", "--height", "64", "--seed", "5000", "--steps", "2"]
    options += [
        "--adapter",
        "image@toyland=places.png",
        "--control-scale",
        "0.8",
        "--isolation",
        "--draft",
        "--refine",
    ]
    for number, name in enumerate(class_words):
        box = f"{number / 3!r},0.25,{(number + 1) / 3!r},0.97"
        options += ["--region", f"{box}:a <{name}>, in a meadow"]
    options += ["--prompt", f"{called[0]}, {called[1]} and {called[2]} in a meadow"]
    CliRunner().invoke(cli.app, ["sample", *options], catch_exceptions=False)
    with Image.open("sample.png") as picture:
        assert picture.tobytes() == drawn.regional[0].tobytes()


def test_a_dry_run_tells_drafts_and_what_regions_say_after_them(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    asked = ["sample", "--base", "no/base", "--concepts", "rex", "--prompt", "x", "--dry-run", "--json"]
    asked += ["--region", "0,0,0.5,1:a <rex>, asleep", "--region", "0.5,0,1,1:the <rex>"]

    def plan(*more: str) -> dict[str, str]:
        return json.loads(CliRunner().invoke(cli.app, [*asked, *more], catch_exceptions=False).stdout)

    drafted, refined, plain = plan(), plan("--refine", "--steps", "20"), plan("--no-draft")
    assert drafted["drafts"] == "2 regions, 3 runs each"
    assert drafted["after drafts"] == "a <rex> dog and a <rex> dog, asleep; a <rex> dog and a <rex> dog"
    assert drafted["time"].endswith(", and drafts")
    assert refined["drawn anew"] == "2 regions, up to 6 runs each"
    assert refined["time"].endswith(", and drafts, and what is drawn anew")
    assert plain["drafts"] == plain["drawn anew"] == "none"
    assert "after drafts" not in plain
