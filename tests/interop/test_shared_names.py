"""What is written for other programs of a transformer's LoRA: we, diffusers and ComfyUI read all of it alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_mixofshow import GradientFuser, LoRASource
from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import EDLoRAFormatError
from diffusers_mixofshow.families import FAMILIES, Family
from diffusers_mixofshow.families.layers import linear_layers
from diffusers_mixofshow.interop import convert, read_lora, write_kohya, write_lora
from families.pipelines import is_here, tiny_pipeline
from families.spellings import differences_of, original_shapes, shapes_in_diffusers


NAMED = [family for family in FAMILIES if family.original and is_here(family)]


@pytest.fixture(scope="module", params=NAMED, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def pipe(family: Family) -> Any:
    return tiny_pipeline(family.name)


def random_lora(
    layers: Mapping[str, tuple[int, int]], ranks: tuple[int, ...], alphas: tuple[float, ...]
) -> dict[str, LowRank]:
    """Updates for sites of these (out, in), with ranks and alphas in turn."""
    generator = torch.Generator().manual_seed(len(layers))
    return {
        site: LowRank(
            down=torch.randn(ranks[n % len(ranks)], width, generator=generator),
            up=torch.randn(out, ranks[n % len(ranks)], generator=generator),
            alpha=alphas[n % len(alphas)],
        )
        for n, (site, (out, width)) in enumerate(layers.items())
    }


def layers_of(pipe: Any) -> dict[str, tuple[int, int]]:
    """Every site of a pipeline to (out, in)."""
    return {site: tuple(layer.weight.shape) for site, layer in linear_layers(pipe.components).items()}


def same(found: Mapping[str, torch.Tensor], lora: Mapping[str, LowRank]) -> None:
    assert found.keys() == lora.keys()
    for site, update in lora.items():
        torch.testing.assert_close(found[site], low_rank_delta(update))


def read(path: Path) -> dict[str, torch.Tensor]:
    return {site: low_rank_delta(update) for site, update in read_lora(path).items()}


def split_by_real_widths(family: Family, site: str) -> bool:
    """Whether diffusers splits a layer in these names by numbers that are FLUX.1's own."""
    return (
        family.name == "FLUX.1"
        and site.startswith("transformer.single")
        and not site.endswith(("proj_out", "norm.linear"))
    )


KINDS = {
    "one rank, no scaling": ((2,), (2.0,)),
    "one rank, scalings": ((2,), (1.0, 4.0, 3.0)),
    "ranks": ((1, 3, 2, 4), (1.0, 3.0, 2.0, 4.0)),
    "ranks and scalings": ((1, 3, 2, 4, 5), (1.0, 0.5, 7.0)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [write_kohya, write_lora])
def test_we_and_diffusers_read_all_that_was_written(
    family: Family, pipe: Any, write: Callable[..., Path], kind: str, tmp_path: Path
) -> None:
    lora = random_lora(layers_of(pipe), *KINDS[kind])
    path = write(tmp_path / "x.safetensors", lora)
    same(read(path), lora)
    if write is write_kohya:  # of which diffusers splits some at their true sizes alone, see below
        lora = {site: update for site, update in lora.items() if not split_by_real_widths(family, site)}
        path = write(tmp_path / "x.safetensors", lora)
    try:
        pipe.load_lora_weights(str(path))
        same(differences_of(pipe), lora)
    finally:
        pipe.unload_lora_weights()


def test_comfyui_has_a_key_for_every_tensor(family: Family, pipe: Any, tmp_path: Path) -> None:
    """The names that it makes of a loaded model's layers, by its rules of 2026, to which a file's have to belong."""
    original, ours = original_shapes(family, pipe), shapes_in_diffusers(family, pipe)
    keys = {f"lora_unet_{path.replace('.', '_')}" for path in original} | {
        f"diffusion_model.{path}" for path in original
    }
    also = {
        "FLUX.1": ["transformer.{}"],
        "FLUX.2 klein": [],  # since it differs from FLUX.1 there
        "Stable Diffusion 3": ["transformer.{}"],
        "Qwen-Image": ["transformer.{}", "{}"],
        "Z-Image": ["transformer.{}", "diffusion_model.{}", "{}"],
        "Krea 2": ["transformer.{}", "diffusion_model.{}", "{}"],
        "Anima": [],
    }
    keys |= {template.format(path) for template in also[family.name] for path in ours}
    for number, encoder in enumerate(family.text_encoders, start=1):
        for site in layers_of(pipe):
            component, _, path = site.partition(".")
            if component == encoder:
                keys |= {site, f"lora_te{number}_{path.replace('.', '_')}"}
    path = write_kohya(tmp_path / "x.safetensors", random_lora(layers_of(pipe), (1, 2), (2.0, 1.0)))
    ends = (".lora_up.weight", ".lora_down.weight", ".lora_B.weight", ".lora_A.weight", ".alpha")
    left = [
        name
        for name in load_file(path)
        if not any(name.endswith(end) and name.removesuffix(end) in keys for end in ends)
    ]
    assert left == []


def test_what_one_file_of_the_original_code_had_comes_back_as_it_was(
    family: Family, pipe: Any, tmp_path: Path
) -> None:
    """Layers that share their `down` are one layer again, of the rank that it had."""
    layers = shapes_in_diffusers(family, pipe)
    lora = random_lora({f"{family.denoiser}.{path}": shape for path, shape in layers.items()}, (2,), (2.0,))
    shared: dict[str, torch.Tensor] = {}
    for site, update in lora.items():
        whole = family.original_name(site.removeprefix(f"{family.denoiser}."))
        lora[site] = replace(update, down=shared.setdefault(whole, update.down))
    first = write_kohya(tmp_path / "first.safetensors", lora)
    again = write_kohya(tmp_path / "again.safetensors", read_lora(first))
    one, two = load_file(first), load_file(again)
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert {tensor.shape[0] for name, tensor in one.items() if "lora_down" in name or "lora_A" in name} == {2}


def test_parts_that_are_not_there_stay_away(family: Family, pipe: Any, tmp_path: Path) -> None:
    some = {site: shape for site, shape in layers_of(pipe).items() if not site.endswith(("to_k", "add_q_proj", "mlp"))}
    lora = random_lora(some, (2, 3), (1.0,))
    same(read(write_kohya(tmp_path / "x.safetensors", lora)), lora)


@pytest.mark.parametrize("ranks", [(2,), (1, 2, 3, 4)])
@pytest.mark.parametrize("shared", [False, True])
def test_flux_1_is_split_again_by_diffusers_at_its_true_sizes(
    ranks: tuple[int, ...], shared: bool, tmp_path: Path
) -> None:
    block, double = "transformer.single_transformer_blocks.0", "transformer.transformer_blocks.0.attn"
    layers = {f"{block}.attn.to_{each}": (3072, 3072) for each in "qkv"} | {f"{block}.proj_mlp": (12288, 3072)}
    layers |= {f"{double}.to_{each}": (3072, 3072) for each in "qkv"}
    lora = random_lora(layers, ranks, (1.0, 2.0))
    if shared:
        first = next(iter(lora.values()))
        lora = {site: replace(first, up=torch.randn(out, first.rank)) for site, (out, _) in layers.items()}
    path = write_kohya(tmp_path / "x.safetensors", lora)
    theirs = diffusers.FluxPipeline.lora_state_dict(str(path))
    some = slice(0, None, 97)
    with safe_open(path, framework="pt") as opened:
        told = json.loads(opened.metadata().get("lora_adapter_metadata", "{}"))
    for site, update in lora.items():
        down, up = theirs.pop(f"{site}.lora_A.weight"), theirs.pop(f"{site}.lora_B.weight")
        torch.testing.assert_close(up[some] @ down[:, some], low_rank_delta(update)[some, some])
        if told:  # diffusers makes its layers of these ranks
            pattern = told["transformer.rank_pattern"]
            name = site.removeprefix("transformer.").replace(".", "\\.")
            assert len(down) == pattern.get(f"^{name}", told["transformer.r"])
        else:
            assert len(down) == ranks[0]
    assert theirs == {}


SITE = "transformer.transformer_blocks.0.attn.{}"


@pytest.mark.parametrize("to", ["kohya"])
def test_a_file_that_may_be_of_several_bases_needs_its_name(to: str, tmp_path: Path) -> None:
    """The attention of double blocks is called alike in many bases, and differently in their original codes."""
    tensors = {}
    for name in ("to_q", "to_add_out"):
        tensors[f"{SITE.format(name)}.lora_A.weight"] = torch.randn(2, 8)
        tensors[f"{SITE.format(name)}.lora_B.weight"] = torch.randn(8, 2)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(
        EDLoRAFormatError, match=r"FLUX\.1, FLUX\.2 klein, Stable Diffusion 3, Qwen-Image.*--base"
    ) as error:
        convert(tmp_path / "x.safetensors", tmp_path / "no", to)
    assert "'black-forest-labs/FLUX.1-dev'" in str(error.value)
    assert not (tmp_path / "no").exists()
    expected = {
        "black-forest-labs/FLUX.1-dev": "lora_unet_double_blocks_0_txt_attn_proj",
        "black-forest-labs/FLUX.2-klein-4B": "diffusion_model.double_blocks.0.txt_attn.proj",
        "stabilityai/stable-diffusion-3.5-medium": "transformer.transformer_blocks.0.attn.to_add_out",
        "Qwen/Qwen-Image": "diffusion_model.transformer_blocks.0.attn.to_add_out",
    }
    for number, (base, name) in enumerate(expected.items()):
        (file,) = convert(tmp_path / "x.safetensors", tmp_path / str(number), to, base_model=base).files
        assert name in {key.rpartition(".lora_")[0] for key in load_file(file)}
        same(read(file), read_lora(tmp_path / "x.safetensors"))


def test_layers_of_other_shapes_than_the_bases_have_no_place_in_its_code(tmp_path: Path) -> None:
    lora = random_lora({SITE.format("to_q"): (8, 8), SITE.format("to_k"): (4, 8)}, (2,), (2.0,))
    lora |= random_lora({"transformer.single_transformer_blocks.0.proj_mlp": (32, 8)}, (2,), (2.0,))
    with pytest.raises(
        EDLoRAFormatError, match=r"shapes of FLUX\.1's: 1 \(transformer\.double_blocks\.0\.img_attn\.qkv\)"
    ):
        write_kohya(tmp_path / "x.safetensors", lora)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_file_of_kohya_is_fused_as_the_same_one_of_diffusers(tmp_path: Path) -> None:
    """By what its layers see; the fused LoRA is written for other programs like any."""
    pipe = tiny_pipeline("FLUX.1")
    layers = {site: shape for site, shape in layers_of(pipe).items() if ".single_transformer_blocks.0." in site}
    fused = {}
    for name, write in {"kohya": write_kohya, "diffusers": write_lora}.items():
        sources = [
            LoRASource(write(tmp_path / f"{name}-{rank}.safetensors", random_lora(layers, (rank,), (1.0,))), ["a dog"])
            for rank in (2, 3)
        ]
        fuser = GradientFuser(pipe, steps=1, height=32, width=32, sequential=False, statistics_bytes=None)
        fused[name] = fuser.fuse(sources)
    assert fused["kohya"].lora.keys() == layers.keys()
    for site, update in fused["diffusers"].lora.items():
        expected, found = low_rank_delta(update), low_rank_delta(fused["kohya"].lora[site])
        assert (found - expected).norm() < 1e-4 * expected.norm(), site
    fused["kohya"].save_pretrained(tmp_path / "both")
    (file,) = convert(tmp_path / "both", tmp_path / "out.safetensors", "kohya").files
    same(read(file), read_lora(tmp_path / "both" / "pytorch_lora_weights.safetensors"))
