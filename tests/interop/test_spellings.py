"""LoRA files of transformers in the names of every program mean what diffusers says that they mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from packaging.version import Version
from safetensors.torch import save_file

from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import EDLoRAFormatError
from diffusers_mixofshow.families import FAMILIES, Family
from diffusers_mixofshow.families.layers import linear_layers
from diffusers_mixofshow.interop import read_lora
from diffusers_mixofshow.interop.foreign import read_foreign
from diffusers_mixofshow.interop.summary import summary_of_foreign
from families.pipelines import is_here, tiny_pipeline
from families.spellings import SPELLINGS, Written, differences_of, written


NAMED = [family for family in FAMILIES if family.original and is_here(family)]
OLD = Version(diffusers.__version__) < Version("0.42")


@pytest.fixture(scope="module", params=NAMED, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def pipe(family: Family) -> Any:
    return tiny_pipeline(family.name)


def saved(folder: Path, file: Written) -> Path:
    save_file({name: tensor.clone() for name, tensor in file.tensors.items()}, folder / "x.safetensors")
    return folder / "x.safetensors"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_as_what_it_means(family: Family, pipe: Any, spelling: str, tmp_path: Path) -> None:
    if family.name == "Qwen-Image" and spelling == "original under PEFT":
        pytest.skip("Its original names are diffusers', so that this is PEFT's own file, which has lost its alpha.")
    file = written(family, pipe, SPELLINGS[spelling])
    found = read_lora(saved(tmp_path, file))
    assert (
        found.keys()
        == file.differences.keys()
        == {site for site in linear_layers(pipe.components) if site.startswith(family.denoiser)}
    )
    for site, difference in file.differences.items():
        torch.testing.assert_close(low_rank_delta(found[site]), difference)


# What diffusers loads whole and right, and of what it leaves out, or splits by FLUX.1's own widths alone, a pattern.
# Some of Z-Image's layers it knows since 0.42.
LOADED = [
    ("FLUX.1", "kohya", r"linear1"),
    ("FLUX.1", "kohya, without alphas", r"linear1"),
    ("FLUX.1", "ComfyUI", r"linear1"),
    ("FLUX.1", "OneTrainer", r"^(?!.*attn)"),
    ("FLUX.1", "diffusers", r"^$"),
    ("FLUX.2 klein", "kohya", r"modulation"),
    ("FLUX.2 klein", "ai-toolkit", r"^$"),
    ("FLUX.2 klein", "original under PEFT", r"^$"),
    ("FLUX.2 klein", "ai-toolkit, diffusers' names", r"modulation"),
    ("Stable Diffusion 3", "diffusers", r"^$"),
    ("Qwen-Image", "kohya", r"^$"),
    ("Qwen-Image", "ai-toolkit", r"^$"),
    ("Qwen-Image", "ComfyUI", r"^$"),
    ("Z-Image", "kohya", r"qkv|attention.out|adaLN" if OLD else r"^$"),
    ("Z-Image", "ai-toolkit, diffusers' names", r"^$"),
    ("Z-Image", "ComfyUI, diffusers' names", r"^$"),
    ("Krea 2", "ai-toolkit", r"^$"),
    ("Krea 2", "original under PEFT", r"^$"),
    ("Anima", "ai-toolkit", r"^$"),
    ("Anima", "diffusers", r"^$"),
]


@pytest.mark.parametrize(("name", "spelling", "without"), LOADED)
def test_what_diffusers_loads_is_what_we_read(name: str, spelling: str, without: str, tmp_path: Path) -> None:
    (family,) = [one for one in FAMILIES if one.name == name]
    if family not in NAMED:
        pytest.skip("The installed diffusers is older than the family.")
    pipe = tiny_pipeline(name)
    ranks = (2,) if OLD else (1, 2, 3)  # before 0.40 it scales them wrong where they differ
    file = written(family, pipe, SPELLINGS[spelling], lambda path: re.search(without, path) is None, ranks)
    path = saved(tmp_path, file)
    found = read_lora(path)
    pipe.load_lora_weights(str(path))
    loaded = differences_of(pipe)
    assert loaded.keys() == found.keys()
    for site, difference in loaded.items():
        torch.testing.assert_close(low_rank_delta(found[site]), difference)


FUSED = {
    "lora_unet_double_blocks_3_img_attn_qkv": ("transformer_blocks.3.attn.to_{}", "q k v", [3072] * 3),
    "lora_unet_double_blocks_3_txt_attn_qkv": ("transformer_blocks.3.attn.add_{}_proj", "q k v", [3072] * 3),
    "lora_unet_single_blocks_37_linear1": (
        "single_transformer_blocks.37.{}",
        "attn.to_q attn.to_k attn.to_v proj_mlp",
        [3072] * 3 + [12288],
    ),
}


@pytest.mark.parametrize("layer", FUSED)
@pytest.mark.parametrize("apart", [False, True], ids=["one", "one beside the other"])
def test_fused_layers_of_flux_1_are_split_as_diffusers_splits_them(layer: str, apart: bool, tmp_path: Path) -> None:
    """At its own widths, which are written into diffusers; also where each part has ranks of its own."""
    template, names, rows = FUSED[layer]
    paths = [template.format(name) for name in names.split()]
    rank = 2 * len(rows) if apart else 3
    down, up = torch.randn(rank, 3072), torch.randn(sum(rows), rank)
    if apart:
        up = torch.block_diag(*(torch.randn(each, 2) for each in rows))
    tensors = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "x.safetensors")
    theirs = diffusers.FluxPipeline.lora_state_dict(str(tmp_path / "x.safetensors"))
    ours = read_lora(tmp_path / "x.safetensors")
    assert list(ours) == [f"transformer.{path}" for path in paths]
    for site, update in ours.items():
        first, second = theirs[f"{site}.lora_A.weight"], theirs[f"{site}.lora_B.weight"]
        assert update.rank == (2 if apart else 3)
        assert (update.down.shape, update.up.shape) == (first.shape, second.shape)
        some = slice(0, None, 97)
        torch.testing.assert_close(low_rank_delta(update)[some, some], second[some] @ first[:, some])


def test_the_last_block_of_stable_diffusion_3_has_a_scale_and_a_shift(tmp_path: Path) -> None:
    """Where the original code has a shift and a scale; its other blocks have six parts in one order."""
    up = torch.arange(32.0)[:, None]
    for rows, expected in ((2 * 4, [*range(4, 8), *range(4)]), (6 * 4, range(24))):
        layer = "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1"
        halves = {f"{layer}.lora_down.weight": torch.ones(1, 4), f"{layer}.lora_up.weight": up[:rows].clone()}
        save_file(halves, tmp_path / "x.safetensors")
        ((site, update),) = read_lora(tmp_path / "x.safetensors").items()
        assert site == "transformer.transformer_blocks.23.norm1_context.linear"
        assert update.up[:, 0].tolist() == list(expected)


def test_a_part_that_is_not_changed_is_left_out_and_none_of_a_lora_without_effect(tmp_path: Path) -> None:
    layer = "diffusion_model.double_blocks.0.img_attn.qkv"
    for up, count in (
        (torch.block_diag(torch.ones(8, 1), torch.ones(8, 1), torch.zeros(8, 1)), 2),
        (torch.zeros(24, 3), 3),
    ):
        save_file(
            {f"{layer}.lora_A.weight": torch.ones(3, 8), f"{layer}.lora_B.weight": up}, tmp_path / "x.safetensors"
        )
        found = read_lora(tmp_path / "x.safetensors")
        assert list(found) == [f"transformer.transformer_blocks.0.attn.to_{each}" for each in "qkv"[:count]]


def pair(layer: str, out: int, width: int) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_down.weight": torch.ones(2, width), f"{layer}.lora_up.weight": torch.ones(out, 2)}


FLUX1, SD3 = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_joint_blocks_0_x_block_attn_qkv"
LINEAR1 = "lora_unet_single_blocks_0_linear1"
TO_Q = "transformer.transformer_blocks.0.attn.to_q"
DEFECTIVE = {
    "rows that are not three times the width": (
        pair(FLUX1, 23, 8),
        ["sizes are not those of FLUX.1: 1 (transformer.double_blocks.0.img_attn.qkv (23, 8))"],
    ),
    "one fits, two do not": (
        pair(FLUX1, 24, 8) | pair(LINEAR1, 55, 8) | pair("lora_unet_single_blocks_0_linear2", 8, 41),
        ["2 (transformer.single_blocks.0.linear1 (55, 8), transformer.single_blocks.0.linear2 (8, 41))"],
    ),
    "of FLUX.1 and FLUX.2": (
        pair(FLUX1, 24, 8) | pair(LINEAR1, 56, 8) | pair("lora_unet_single_blocks_1_linear1", 72, 8),
        ["not those of FLUX.1: 1 (transformer.single_blocks.1.linear1 (72, 8))"],
    ),
    "of two families": (
        pair(FLUX1, 24, 8) | pair(LINEAR1, 56, 8) | pair(SD3, 24, 8),
        ["not those of FLUX.1: 1 (transformer.joint_blocks.0.x_block.attn.qkv (24, 8))"],
    ),
    "of two families in diffusers' names": (
        {
            name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value
            for name, value in (
                pair("transformer.single_transformer_blocks.0.proj_mlp", 32, 8)
                | pair("transformer.single_transformer_blocks.0.proj_out", 8, 40)
                | pair("transformer.transformer_blocks.0.img_mod.1", 48, 8)
                | pair("transformer.transformer_blocks.0.attn.to_k", 8, 8)
            ).items()
        },
        ["not those of FLUX.1: 1 (transformer.transformer_blocks.0.img_mod.1 (48, 8))"],
    ),
    "a U-Net's beside a transformer's": (
        pair(LINEAR1, 56, 8) | pair("lora_unet_mid_block_attentions_0_proj_in", 8, 8) | pair(FLUX1, 24, 8),
        ["not those of FLUX.1: 1 (unet.mid_block.attentions.0.proj_in (8, 8))"],
    ),
    "a text encoder that the base has not": (
        pair(LINEAR1, 72, 8)
        | pair("lora_unet_single_blocks_0_linear2", 8, 32)
        | pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 32, 8),
        ["not those of FLUX.2 klein: 1 (text_encoder.text_model.encoder.layers.0.mlp.fc1 (32, 8))"],
    ),
    "given twice": (
        pair(FLUX1, 24, 8) | pair("lora_unet_transformer_blocks_0_attn_to_k", 8, 8),
        ["layers given twice: 1 (transformer.transformer_blocks.0.attn.to_k)"],
    ),
    "all at once": (
        pair(FLUX1, 23, 8) | pair(LINEAR1, 56, 8) | pair(SD3, 24, 8) | {f"{TO_Q}.lora_A.weight": torch.ones(2, 8)},
        [
            "only one of the two matrices, down or up: 1 (transformer.transformer_blocks.0.attn.to_q)",
            "2 (transformer.double_blocks.0.img_attn.qkv (23, 8), transformer.joint_blocks.0.x_block.attn.qkv (24, ",
        ],
    ),
}


@pytest.mark.parametrize("case", DEFECTIVE)
def test_what_does_not_fit_is_told_at_once(case: str, tmp_path: Path) -> None:
    tensors, told = DEFECTIVE[case]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(EDLoRAFormatError) as error:
        read_lora(tmp_path / "x.safetensors")
    assert [text for text in told if text not in str(error.value)] == []
    assert str(error.value).count(";") == len(told) - 1


@pytest.mark.parametrize(
    ("spelling", "layout"),
    [
        ("kohya", "kohya / A1111 / ComfyUI"),
        ("ai-toolkit", "ai-toolkit / ComfyUI"),
        ("ComfyUI", "ComfyUI, saved by its own nodes"),
        ("original", "the original code's names"),
        ("OneTrainer", "OneTrainer"),
        ("LyCORIS", "LyCORIS"),
        ("diffusers", "diffusers"),
    ],
)
def test_a_summary_tells_family_program_ranks_and_layers(spelling: str, layout: str, tmp_path: Path) -> None:
    family = next(one for one in FAMILIES if one.name == "FLUX.1")
    file = written(family, tiny_pipeline("FLUX.1"), SPELLINGS[spelling])
    told = summary_of_foreign(read_foreign(saved(tmp_path, file)))
    assert (told["kind"], told["layout"], told["architecture"], told["problems"]) == ("LoRA", layout, "FLUX.1", [])
    assert told["ranks"] == [1, 2, 3]
    assert told["layers"] == {"transformer": len(file.differences)}


def test_the_clip_of_flux_1_is_read_beside_it(tmp_path: Path) -> None:
    clip = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    save_file(pair(LINEAR1, 56, 8) | pair(clip, 8, 8), tmp_path / "x.safetensors")
    told = summary_of_foreign(read_foreign(tmp_path / "x.safetensors"))
    assert (told["architecture"], told["layers"]) == ("FLUX.1", {"text_encoder": 1, "transformer": 4})


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_the_processors_of_xlabs_are_read_as_diffusers_reads_them(prefix: str, tmp_path: Path) -> None:
    pipe, generator, tensors = tiny_pipeline("FLUX.1"), torch.Generator().manual_seed(0), {}
    layers = {f"double_blocks.{n}.processor.{part}": shape for n in (0, 1) for part, shape in (
        ("qkv_lora1", (96, 32)), ("qkv_lora2", (96, 32)), ("proj_lora1", (32, 32)), ("proj_lora2", (32, 32))
    )}  # fmt: skip
    layers |= {"single_blocks.1.processor.qkv_lora": (96, 32), "single_blocks.1.processor.proj_lora": (32, 160)}
    for layer, (out, width) in layers.items():
        tensors[f"{prefix}{layer}.down.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{prefix}{layer}.up.weight"] = torch.randn(out, 2, generator=generator)
    path = saved(tmp_path, Written(tensors))
    found = read_lora(path)
    pipe.load_lora_weights(str(path))
    loaded = differences_of(pipe)
    assert loaded.keys() == found.keys()
    assert len(found) == 2 * 8 + 4
    for site, difference in loaded.items():
        torch.testing.assert_close(low_rank_delta(found[site]), difference)
    assert summary_of_foreign(read_foreign(path))["architecture"] == "FLUX.1"
