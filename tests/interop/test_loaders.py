"""What other programs' loaders make of the LoRA files that are written for them: every layer's change, exactly."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file

import packs
import tiny
from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.edlora.stock import KEY, adapter_metadata
from diffusers_mixofshow.families.layers import linear_layers
from diffusers_mixofshow.interop import read_lora, write_kohya, write_lora


SHAPES = {
    "one rank, one alpha": ((4,), (2.0,)),
    "one rank, alpha of one": ((3,), (1.0,)),
    "alphas of powers of two": ((4,), (4.0, 1.0, 0.5)),
    "alphas that no power of two joins": ((4,), (4.0, 1 / 3)),
    "ranks, one alpha": ((1, 4, 8), (4.0,)),
    "ranks, each its alpha": ((6, 4, 8), (6.0, 4.0, 8.0)),
    "ranks and alphas": ((4, 2, 8), (4.0, 1.0)),
    "most layers without effect": ((4,), (0.0, 0.0, 4.0)),
    "no layer with effect": ((4,), (0.0,)),
    "alphas below zero": ((4,), (-4.0, 4.0)),
}
"""Ranks and alphas, dealt out over the layers in turn."""


@pytest.fixture(scope="module")
def components() -> dict[str, object]:
    return tiny.components()


def random_lora(components, ranks, alphas, dtype=torch.float32) -> Mapping[str, LowRank]:
    return packs.random_pack(components, "rex", ranks=ranks, alphas=alphas, dtype=dtype).lora


def as_kohya_a1111_and_comfyui_scale(file: Path) -> dict[str, torch.Tensor]:
    """Layer as the file names it to its change: by alpha / rank, or unscaled without an alpha.

    kohya's own loader takes an alpha of 0 for none.
    """
    tensors = load_file(file)
    changes = {}
    for name in tensors:
        if name.endswith(".lora_down.weight"):
            layer = name.removesuffix(".lora_down.weight")
            down, up = (tensors[f"{layer}.lora_{half}.weight"].double().flatten(1) for half in ("down", "up"))
            alpha = tensors[f"{layer}.alpha"].item() if f"{layer}.alpha" in tensors else 0
            changes[layer] = (alpha or len(down)) / len(down) * (up @ down)
    return changes


def in_double(update: LowRank) -> torch.Tensor:
    return update.scaling * (update.up.double() @ update.down.double())


def assert_same_change(got: torch.Tensor, expected: torch.Tensor, scaling: float) -> None:
    """Equal; where the scaling is no power of two, but for one rounding of float32 in each term of the sum."""
    exact = scaling == 0 or abs(scaling) == 2.0 ** round(torch.tensor(abs(scaling)).log2().item())
    tolerance = 1e-12 if exact else 1e-6
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "alphas"), SHAPES.values(), ids=SHAPES)
def test_kohya_a1111_and_comfyui_scale_as_we_do(tmp_path: Path, components, ranks, alphas, dtype):
    lora = random_lora(components, ranks, alphas, dtype)
    found = as_kohya_a1111_and_comfyui_scale(write_kohya(tmp_path / "x.safetensors", lora))
    assert len(found) == len(lora)
    for change, update in zip(found.values(), _in_the_order_of(found, lora), strict=True):
        assert_same_change(change, in_double(update), update.scaling)


def _in_the_order_of(layers, lora):
    """The updates in the order of the file's layers, whose names are the sites' with other separators."""
    spelt = {re.sub(r"\W", "_", re.sub(r"^text_encoder", "te", site)): update for site, update in lora.items()}
    return [spelt[layer.removeprefix("lora_")] for layer in layers]


@pytest.mark.parametrize("write", [write_kohya, write_lora])
@pytest.mark.parametrize(("ranks", "alphas"), SHAPES.values(), ids=SHAPES)
def test_stock_diffusers_scales_as_we_do(tmp_path: Path, write, ranks, alphas, recwarn):
    components = tiny.components()
    lora = random_lora(components, ranks, alphas)
    assert_loaded_right(components, write(tmp_path / "x.safetensors", lora), lora)
    assert not [warning for warning in recwarn if "pattern" in str(warning.message)]


@pytest.mark.parametrize("write", [write_kohya, write_lora])
def test_stock_diffusers_scales_a_text_encoder_of_either_shape(tmp_path: Path, write):
    components = packs.with_nested_text_encoder(tiny.components())
    lora = random_lora(components, *SHAPES["ranks and alphas"])
    assert_loaded_right(components, write(tmp_path / "x.safetensors", lora), lora)


def assert_loaded_right(components, file: Path, lora: Mapping[str, LowRank]) -> None:
    pipe = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipe.load_lora_weights(file)
    layers = linear_layers(components)
    for site, update in lora.items():
        delta = layers[site].get_delta_weight(layers[site].active_adapters[0])
        torch.testing.assert_close(delta, low_rank_delta(update))


@pytest.mark.parametrize("write", [write_kohya, write_lora])
@pytest.mark.parametrize(("ranks", "alphas"), SHAPES.values(), ids=SHAPES)
def test_we_read_back_what_we_write(tmp_path: Path, components, write, ranks, alphas):
    lora = random_lora(components, ranks, alphas)
    back = read_lora(write(tmp_path / "x.safetensors", lora))
    assert back.keys() == lora.keys()
    for site, update in lora.items():
        assert_same_change(in_double(back[site]), in_double(update), update.scaling)


def test_one_alpha_leaves_ranks_alpha_and_values_as_they_are(tmp_path: Path, components):
    for ranks in ((4,), (1, 4)):
        lora = random_lora(components, ranks, (1 / 3,), torch.float16)
        back = read_lora(write_kohya(tmp_path / "x.safetensors", lora))
        assert all(torch.equal(back[site].up, update.up) for site, update in lora.items())
        assert {update.alpha for update in back.values()} == {1 / 3}


def test_folding_keeps_the_dtype_only_where_that_is_exact():
    values = torch.full((2, 2), 3 * 2.0**-24, dtype=torch.float16)  # half of it is no number of float16
    update = LowRank(down=values, up=values, alpha=1.0)
    assert update.folded.up.dtype == torch.float32
    assert torch.equal(update.folded.up, values.float() / 2)
    assert LowRank(down=values, up=8 * values, alpha=1.0).folded.up.dtype == torch.float16


@pytest.mark.parametrize(
    ("site", "strangers"),
    [
        ("unet.proj_out", ("single.0.proj_out", "proj_out.0", "xproj_out")),
        ("unet.up.1.to_k", ("x.up.1.to_k", "up.11.to_k", "upx1.to_k")),
        (
            "text_encoder.text_model.encoder.layers.1.mlp.fc1",
            ("encoder.layers.11.mlp.fc1", "vision.layers.1.mlp.fc1", "xencoder.layers.1.mlp.fc1"),
        ),
    ],
)
def test_a_pattern_in_the_header_is_one_layers(site: str, strangers: tuple[str, ...]):
    other = LowRank(down=torch.ones(4, 2), up=torch.ones(2, 4), alpha=4.0)
    component, _, path = site.partition(".")
    usual = {f"{component}.usual.{number}": other for number in range(3)}
    rare = LowRank(down=torch.ones(2, 2), up=torch.ones(2, 2), alpha=8.0)
    settings = json.loads(adapter_metadata(usual | {site: rare})[KEY])
    for patterns, value in (("rank_pattern", 2), ("alpha_pattern", 8.0)):
        table = settings[f"{component}.{patterns}"]
        for name in {path, path.removeprefix("text_model.")}:
            assert table[get_pattern_key(table, name)] == value
        assert not [name for name in strangers if get_pattern_key(table, name) in table]


def test_the_header_says_which_alpha_is_meant_where_no_layer_has_one(tmp_path: Path, components):
    file = write_kohya(tmp_path / "x.safetensors", random_lora(components, (6, 4, 8), (6.0, 4.0, 8.0)))
    with safe_open(file, framework="pt") as opened:
        header, names = opened.metadata(), list(opened.keys())
    assert not [name for name in names if name.endswith(".alpha")]
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert json.loads(header[KEY])["unet.lora_alpha"] == json.loads(header[KEY])["unet.r"]
