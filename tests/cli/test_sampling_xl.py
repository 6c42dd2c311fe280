"""`mixofshow sample` with a base of Stable Diffusion XL: the same options, and what is told of other bases."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import packs
import tiny
from diffusers_mixofshow import EDLoRA, MixOfShowXLPipeline, cli
from diffusers_mixofshow.cli.base_model import choose_guidance, read_layers
from diffusers_mixofshow.errors import ConfigurationError, EDLoRAFormatError
from diffusers_mixofshow.interop.checkpoint import refuse_single_file
from diffusers_mixofshow.sampling.control import ADAPTERS, CONTROLNETS, Control, add_controls
from families.pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a base, concepts for it and for another family, a ControlNet, a T2I-Adapter, and a picture."""
    folder = tmp_path_factory.mktemp("place")
    base = tiny_pipeline("Stable Diffusion XL")
    base.save_pretrained(folder / "base")
    tiny_pipeline("FLUX.1").save_pretrained(folder / "flux")
    tiny.controlnet(base.unet).save_pretrained(folder / "net")
    tiny.adapter().save_pretrained(folder / "adapter")
    pack = packs.random_pack(base.components, "rex")
    dataclasses.replace(pack, base_model=str(folder / "base")).save_pretrained(folder / "rex")
    packs.random_pack(tiny.components(), "tom").save_pretrained(folder / "tom")
    unet = "model.diffusion_model."
    for name, keys in {
        "xl": (f"{unet}input_blocks.0.0.weight", f"{unet}label_emb.0.0.weight"),
        "flux": ("double_blocks.0.img_attn.qkv.weight",),
    }.items():
        save_file({key: torch.zeros(1) for key in keys}, folder / f"{name}.safetensors")
    slope = Image.linear_gradient("L").resize((32, 32))
    slope.convert("RGB").save(folder / "photo.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(folder / "mask.png")
    return folder


@pytest.fixture
def sample(place, monkeypatch):
    monkeypatch.chdir(place)

    def run(*options: str, prompt: str = "a <rex> here") -> str:
        common = ["--prompt", prompt, "--steps", "2", "--width", "32", "--height", "32", "--overwrite"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = CliRunner().invoke(cli.app, ["sample", *common, "--output", "x.png", *options])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    return run


WAYS = {
    "text": (),
    "regions": ("--region", "0,0,0.5,1:a <rex>", "--region", "0.5,0,1,1:a cat"),
    "regions drawn anew": ("--region", "0,0,0.5,1:a <rex>", "--refine"),
    "image to image": ("--image", "photo.png"),
    "inpainting": ("--image", "photo.png", "--mask", "mask.png"),
    "ControlNet": ("--control", "image@net=photo.png"),
    "T2I-Adapter": ("--adapter", "image@adapter=photo.png"),
}


def test_every_way_draws_with_the_base_that_the_concept_names(sample, place):
    drawn = {}
    for way, options in WAYS.items():
        told = json.loads(sample("--concepts", "rex", "--lora-scale", "0.2", "--json", *options))
        assert (told["base"], told["guidance"]) == (str(place / "base"), 5.0)
        drawn[way] = np.asarray(Image.open("x.png")).astype(int)
    for number, one in enumerate(drawn.values()):
        assert one.shape == (32, 32, 3)
        assert not any(np.array_equal(one, other) for other in list(drawn.values())[:number])


def test_regions_need_no_concept(sample):
    def drawn(*options: str) -> np.ndarray:
        sample("--base", "base", *options, prompt="two pets")
        return np.asarray(Image.open("x.png")).astype(int)

    plain = drawn()
    assert not np.array_equal(drawn("--region", "0,0,0.5,1:a cat"), plain)
    assert not np.array_equal(drawn("--negative-prompt", "bad"), plain)


def test_concepts_tell_the_guidance_of_a_base_that_is_not_known_and_a_folder_its_groups_of_layers(place):
    rex, tom = (EDLoRA.from_pretrained(place / name) for name in ("rex", "tom"))
    assert [choose_guidance("user/unknown", packs) for packs in ([rex], [tom], [])] == [5.0, 7.5, 7.5]
    assert [choose_guidance(base, [tom]) for base in (str(place / "base"), "toyland")] == [5.0, 3.0]
    assert read_layers(str(place / "base")) == rex.layers


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        (("--base", "base", "--concepts", "tom"), EDLoRAFormatError, "no embeddings for text_encoder_2"),
        (("--base", "photo.png"), ConfigurationError, "single file.*from_single_file"),
        (("--base", "xl.safetensors"), ConfigurationError, r"single file.*: MixOfShowXLPipeline\.from_single_file"),
        (("--base", "flux.safetensors"), ConfigurationError, "no checkpoint of .*those of FLUX"),
        (("--base", "flux", "--region", "0,0,0.5,1:a cat"), ConfigurationError, "flux' is of FLUX.1, .* no regions"),
        (("--base", "flux", "--concepts", "tom"), ConfigurationError, "flux' is of FLUX.1, .* no concepts"),
    ],
)
def test_what_does_not_go_together_is_told(sample, options, error, told):
    with pytest.raises(error, match=told):
        sample(*options, prompt="a dog")


@pytest.mark.parametrize("base", [("--base", "base"), ("--concepts", "rex", "--base", "user/unknown")])
@pytest.mark.parametrize(("option", "models"), [("--control", CONTROLNETS), ("--adapter", ADAPTERS)])
@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["done", "planned"])
def test_a_control_without_a_model_is_refused_before_the_base_is_loaded(sample, base, option, models, more):
    """Known by their detectors are models for Stable Diffusion 1.x alone."""
    with pytest.raises(ConfigurationError) as error:
        sample(*base, *more, option, "canny=photo.png", prompt="a dog")
    assert f"; {models['canny']} would be taken" in str(error.value)
    assert str(error.value).endswith("Name a model for Stable Diffusion XL: 'canny@MODEL=photo.png'.")


def test_a_control_without_a_model_is_refused_for_a_base_that_only_its_weights_tell():
    controls = [Control(name, CONTROLNETS[name], Path("photo.png")) for name in ("canny", "mlsd")]
    with pytest.raises(ConfigurationError, match=r": 'canny@MODEL=photo\.png' and 'mlsd@MODEL=photo\.png'\.$"):
        add_controls(MixOfShowXLPipeline(**tiny_pipeline("Stable Diffusion XL").components), controls)


@pytest.mark.parametrize(
    "verb",
    [
        ("sample", "--prompt", "a dog"),
        ("evaluate", "rex"),
        ("compare", "rex"),
        ("fuse", "rex", "kit", "--output", "both"),
        ("fuse", "rex", "kit", "--output", "both", "--method", "average"),
        ("train", "photos", "--concept", "tim", "--class-word", "cat"),
    ],
    ids=lambda verb: verb[0] + verb[-1],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["done", "planned"])
def test_a_checkpoint_of_one_file_is_one_error_that_says_how_to_make_a_folder(place, monkeypatch, verb, more):
    """Before anything is loaded, by every verb that takes a base; what the error says can be pasted."""
    monkeypatch.chdir(place)
    (place / "photos").mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(place / "photos" / "one.png")
    if not (place / "kit").exists():
        kit = packs.random_pack(tiny_pipeline("Stable Diffusion XL").components, "kit", seed=1)
        dataclasses.replace(kit, base_model=str(place / "base")).save_pretrained("kit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(cli.app, [*verb, *more, "--base", "xl.safetensors"])
    assert isinstance(result.exception, ConfigurationError), result.output
    told = str(result.exception)
    assert "'xl.safetensors' is a single file. Expected a Hub id or a folder." in told
    call = "MixOfShowXLPipeline.from_single_file('xl.safetensors', dtype=torch.float16).save_pretrained('xl')"
    assert f"{call}, after import torch and from diffusers_mixofshow import MixOfShowXLPipeline. Then name xl." in told


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "", "~nobody/x.safetensors", "user/base", "base"])
def test_what_is_no_file_is_left_to_whatever_loads_it(place, monkeypatch, name):
    monkeypatch.chdir(place)
    refuse_single_file(name)
