"""ED-LoRAs of SDXL: embeddings for two text encoders and a vector of the whole text, as data, as files, on a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import packs
import tiny
from diffusers_mixofshow import EDLoRA, MixOfShowXLPipeline
from diffusers_mixofshow.errors import EDLoRAFormatError
from diffusers_mixofshow.exporting import share_layers
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.interop import convert
from diffusers_mixofshow.interop.summary import summary_of_pack
from diffusers_mixofshow.interop.textual_inversion import is_layerwise, mean_over_layers
from families.pipelines import tiny_pipeline


SECOND, VECTOR = "text_encoder_2.<rex1>", "pooled.<rex1>"


@pytest.fixture(scope="module")
def stock() -> Any:
    pipeline = tiny_pipeline("Stable Diffusion XL")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pack(stock: Any) -> EDLoRA:
    return packs.random_pack(stock.components)


@pytest.fixture
def saved(pack: EDLoRA, tmp_path: Path) -> Path:
    return pack.save_pretrained(tmp_path / "pack")


def contents(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        return json.loads(opened.metadata()["edlora"]), tensors


def written(path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt", "edlora": json.dumps(header)})
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_round_trip_is_exact_and_names_what_the_page_on_formats_names(
    stock: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    pack = packs.random_pack(stock.components, "rex", "kit", ranks=(1, 3), alphas=(2.0, 0.5), dtype=dtype)
    path = pack.save_pretrained(tmp_path)
    packs.assert_same_pack(EDLoRA.from_pretrained(path), pack)
    header, tensors = contents(path)
    assert header["format_version"] == 2
    assert header["layers"] == ["down_blocks.1.attentions.0", "mid_block.attentions.0",
                                "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"]  # fmt: skip
    shapes = {
        name.removeprefix("edlora.embeddings."): tuple(rows.shape)
        for name, rows in tensors.items()
        if name.startswith("edlora.embeddings.")
    }
    tokens = ("<rex1>", "<rex2>", "<kit1>", "<kit2>")
    assert shapes == {
        f"{part}{token}": shape
        for token in tokens
        for part, shape in (("", (4, 32)), ("text_encoder_2.", (4, 48)), ("pooled.", (1, 48)))
    }


def test_what_has_one_text_encoder_is_written_as_ever(tmp_path: Path) -> None:
    path = packs.random_pack(tiny.components()).save_pretrained(tmp_path)
    assert contents(path)[0]["format_version"] == 1


def without(name: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda header, tensors: tensors.pop(f"edlora.embeddings.{name}")


def with_rows(name: str, rows: torch.Tensor) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda header, tensors: tensors.update({f"edlora.embeddings.{name}": rows})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda header, tensors: header.update(format_version=1), "format 1 does not have"),
        (without(SECOND), f"missing embeddings: 1 ({SECOND})"),
        (without(VECTOR), f"missing embeddings: 1 ({VECTOR})"),
        (without("<rex1>"), "missing embeddings: 1 (<rex1>)"),
        (with_rows("text_encoder_2.<tom1>", torch.zeros(4, 48)), "that no concept has: 1 (text_encoder_2.<tom1>)"),
        (with_rows("text_encoder_3.<rex1>", torch.zeros(4, 48)), "for no known text encoder"),
        (with_rows("text_encoder.<rex1>", torch.zeros(4, 32)), "for no known text encoder"),
        (with_rows(SECOND, torch.zeros(5, 48)), "not of shape (layers = 4, dim), or for 'pooled' (1, dim): 1 (text_"),
        (with_rows(SECOND, torch.zeros(4, 47)), "embeddings differ in width: 2 (text_encoder_2.<rex1> 47"),
        (with_rows(VECTOR, torch.zeros(4, 48)), f"1 ({VECTOR} (4, 48))"),
        (with_rows(VECTOR, torch.zeros(48)), f"1 ({VECTOR} (48,))"),
        (with_rows(VECTOR, torch.full((1, 48), float("nan"))), f"not finite: 1 ({VECTOR})"),
        (with_rows(SECOND, torch.zeros(4, 48, dtype=torch.int8)), "not in a floating dtype"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told(saved: Path, change: Callable[..., Any], told: str) -> None:
    header, tensors = contents(saved)
    change(header, tensors)
    with pytest.raises(EDLoRAFormatError) as caught:
        EDLoRA.from_pretrained(written(saved, header, tensors))
    assert told in str(caught.value)


def test_it_fits_its_own_model_and_any_part_of_it(pack: EDLoRA, stock: Any) -> None:
    pack.check_fits(stock.components)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        pack.check_fits({name: stock.components[name]})


def test_a_concept_of_one_family_on_the_other_is_one_error_that_says_what_is_expected(
    pack: EDLoRA, stock: Any
) -> None:
    with pytest.raises(EDLoRAFormatError) as caught:
        packs.random_pack(tiny.components()).check_fits(stock.components)
    for part in (
        "no embeddings for text_encoder_2",
        "no embeddings for the pooled vector of the whole text",
        "someone/tiny",
    ):
        assert part in str(caught.value)
    with pytest.raises(EDLoRAFormatError) as caught:
        pack.check_fits(tiny.components())
    for part in (
        "embeddings for text_encoder_2, which",
        "for the pooled vector of the whole text, which",
        "layers that the",
    ):
        assert part in str(caught.value)


def test_other_widths_than_the_text_encoders_are_told(pack: EDLoRA, stock: Any) -> None:
    narrow = {name: rows[:, :20] if "_2" in name else rows for name, rows in pack.embeddings.items()}
    with pytest.raises(EDLoRAFormatError, match=r"width 48: 2 \(text_encoder_2.<rex1> 20"):
        dataclasses.replace(pack, embeddings=narrow).check_fits(stock.components)


@pytest.mark.parametrize(("ranks", "alphas"), [((4,), (4.0,)), ((1, 2, 3), (1.0, 4.0))])
def test_a_stock_pipeline_loads_the_file_as_a_lora_with_the_right_effect(
    stock: Any, tmp_path: Path, ranks: tuple[int, ...], alphas: tuple[float, ...]
) -> None:
    from diffusers_mixofshow.lora import merged

    pack = packs.random_pack(stock.components, ranks=ranks, alphas=alphas)
    path = pack.save_pretrained(tmp_path)

    def picture() -> torch.Tensor:
        settings = {"num_inference_steps": 1, "output_type": "latent", "height": 32, "width": 32}
        return stock("a dog", generator=torch.Generator().manual_seed(0), **settings).images

    plain = picture()
    with merged(stock.components, pack):
        expected = picture()
    stock.load_lora_weights(path.parent, weight_name=path.name)
    found = picture()
    stock.unload_lora_weights()
    assert not torch.allclose(expected, plain, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("to", ["diffusers", "kohya", "textual-inversion"])
def test_other_programs_get_the_means_for_both_encoders_and_hear_of_the_rest(
    pack: EDLoRA, tmp_path: Path, to: str
) -> None:
    done = convert(pack, tmp_path / "other", to)
    (words,) = [file for file in done.files if "rex" in file.name and read_keys(file) == {"clip_l", "clip_g"}]
    with safe_open(words, framework="pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}
    for name, part in (("clip_l", ""), ("clip_g", "text_encoder_2.")):
        expected = torch.stack([pack.embeddings[f"{part}<rex{number}>"].mean(dim=0) for number in (1, 2)])
        torch.testing.assert_close(found[name], expected)
    assert any("pooled text vector" in said for said in done.lost)
    assert any("--base" in said for said in done.lost)  # by which most of it is kept
    assert any(said.startswith("text_encoder_2.<rex1>: ") for said in done.lost)
    assert not any(said.startswith("pooled.") for said in done.lost)


def read_keys(file: Path) -> set[str]:
    if file.suffix != ".safetensors":
        return set()
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


@pytest.mark.parametrize("with_updates", [True, False])
def test_the_authors_layout_has_no_place_for_it(pack: EDLoRA, tmp_path: Path, with_updates: bool) -> None:
    given = pack if with_updates else dataclasses.replace(pack, lora={})
    with pytest.raises(EDLoRAFormatError, match="second text encoder"):
        convert(given, tmp_path / "x.pth", "mix-of-show")


@torch.no_grad()
def test_shared_layers_keep_what_each_group_s_own_embeddings_do_to_keys_and_values(
    pack: EDLoRA, stock: Any, tmp_path: Path
) -> None:
    """Measured by what all cross-attention layers make of a prompt, with the concept's updates in the weights."""
    prompts = ["a <TOK>", "photo of a <TOK>"]
    shared = share_layers(stock, pack, prompts)
    assert not is_layerwise(shared)
    for name, rows in pack.embeddings.items():
        assert torch.equal(shared.embeddings[name], mean_over_layers(rows).expand_as(rows))
    means = dataclasses.replace(shared, lora=pack.lora)
    pipe = MixOfShowXLPipeline(**stock.components, add_watermarker=False)
    outputs = {}
    for name, each in (("own", pack), ("shared", shared), ("means", means)):
        pipe.load_edlora(each)
        groups = pipe.encode_prompt("photo of a <rex>", device="cpu")[0].unflatten(1, (len(pack.layers), -1))[0]
        paths = cross_attention_layers(pipe.unet)
        outputs[name] = torch.cat(
            [
                getattr(pipe.unet.get_submodule(path), half)(
                    groups[pack.layers.index(path.partition(".transformer")[0])]
                )
                for path in paths
                for half in ("to_k", "to_v")
            ],
            dim=1,
        )
        pipe.unload_edlora()
    assert outputs["own"].shape[1] == 2 * 8 * 64  # all layers of all groups
    far, near = ((outputs[name] - outputs["own"]).norm() for name in ("means", "shared"))
    assert near < 0.7 * far  # of random weights, and of a rank that does not hold all of it
    lost = convert(shared, tmp_path / "other", "kohya").lost
    assert any("of what they do to keys and values is in the LoRA" in said for said in lost)
    assert any("pooled text vector" in said for said in lost)
    with pytest.raises(EDLoRAFormatError, match="does not fit"):
        share_layers(tiny_pipeline("Stable Diffusion"), pack)


def test_a_summary_counts_what_there_is(pack: EDLoRA) -> None:
    embeddings_alone = dataclasses.replace(pack, lora={})
    wide = {
        name: torch.zeros(len(rows), 768 if name.startswith("<") else 1280) for name, rows in pack.embeddings.items()
    }
    told = summary_of_pack(dataclasses.replace(embeddings_alone, embeddings=wide))
    assert told["architecture"] == "Stable Diffusion XL"
    assert told["concepts"][0]["tokens"].keys() == {"<rex1>", "<rex2>"}
