"""LoHa, LoKr and full differences are read exactly where they are of low rank, and refused by name elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

from diffusers_mixofshow.base_models import location_of
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import EDLoRAFormatError
from diffusers_mixofshow.families import Family
from diffusers_mixofshow.families.layers import linear_layers
from diffusers_mixofshow.families.sdxl import STABLE_DIFFUSION_XL
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_mixofshow.interop import convert, lycoris, read_lora
from diffusers_mixofshow.interop.foreign import read_foreign
from diffusers_mixofshow.interop.lycoris import HIGHEST_RANK
from diffusers_mixofshow.interop.summary import summary_of_foreign
from families.pipelines import tiny_pipeline


# A layer of a transformer that may have any shape.
LAYER, SITE = "lora_unet_blocks_0_attn_gate", "transformer.transformer_blocks.0.attn.to_gate"
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
Tensors = dict[str, torch.Tensor]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def saved(folder: Path, layer: str, parts: Tensors) -> Path:
    save_file({f"{layer}.{part}": tensor.contiguous() for part, tensor in parts.items()}, folder / "x.safetensors")
    return folder / "x.safetensors"


def loha(out: int, width: int, ranks: tuple[int, int] = (3, 3), dtype: torch.dtype = torch.float32) -> Tensors:
    shapes = {"1": ranks[0], "2": ranks[1]}
    parts = {f"hada_w{n}_a": numbers(out, rank, seed=int(n), dtype=dtype) for n, rank in shapes.items()}
    return parts | {f"hada_w{n}_b": numbers(rank, width, seed=9 + int(n), dtype=dtype) for n, rank in shapes.items()}


def as_loha(parts: Tensors) -> torch.Tensor:
    a, b, c, d = (parts[f"hada_w{n}_{half}"].double() for n in "12" for half in "ab")
    return (a @ b) * (c @ d)


# The first factor, and the second, as shapes; whole ones are of two numbers, others of (out, rank, in).
LOKR = {
    "second taken apart": ((4, 4), (8, 2, 8)),
    "first taken apart": ((4, 1, 6), (8, 5)),
    "both taken apart": ((6, 2, 4), (8, 2, 8)),
    "first wide": ((2, 8), (16, 1, 4)),
    "first high": ((8, 2), (4, 1, 16)),
    "first wider than any rank": ((2, HIGHEST_RANK + 44), (4, 1, 4)),
    "first higher than any rank": ((HIGHEST_RANK + 44, 2), (4, 1, 4)),
}


def lokr(first: tuple[int, ...], second: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensors:
    parts = {}
    for name, shape in (("lokr_w1", first), ("lokr_w2", second)):
        if len(shape) == 2:
            parts[name] = numbers(*shape, seed=len(parts), dtype=dtype)
        else:
            parts[f"{name}_a"] = numbers(shape[0], shape[1], seed=len(parts), dtype=dtype)
            parts[f"{name}_b"] = numbers(shape[1], shape[2], seed=len(parts), dtype=dtype)
    return parts


def as_lokr(parts: Tensors) -> torch.Tensor:
    wholes = []
    for name in ("lokr_w1", "lokr_w2"):
        whole = parts.get(name)
        wholes.append(parts[f"{name}_a"].double() @ parts[f"{name}_b"].double() if whole is None else whole.double())
    return torch.kron(*wholes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [None, 1.5, 4.0])
@pytest.mark.parametrize("ranks", [(3, 3), (1, 1), (2, 4)])
def test_a_loha_is_the_product_of_its_halves(
    ranks: tuple[int, int], alpha: float | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    parts = loha(20, 24, ranks, dtype)
    path = saved(tmp_path, LAYER, parts | ({} if alpha is None else {"alpha": torch.tensor(alpha)}))
    ((site, update),) = read_lora(path).items()
    assert (site, update.rank) == (SITE, ranks[0] * ranks[1])
    expected = as_loha(parts) * (1 if alpha is None else alpha / ranks[0])
    torch.testing.assert_close(low_rank_delta(update).double(), expected, rtol=1e-4, atol=1e-5)
    summary = summary_of_foreign(read_foreign(path))
    assert (summary["kind"], summary["ranks"], summary["problems"]) == ("LoRA", [update.rank], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("kind", LOKR)
def test_a_lokr_is_the_kronecker_product(kind: str, alpha: float | None, dtype: torch.dtype, tmp_path: Path) -> None:
    parts = lokr(*LOKR[kind], dtype)
    path = saved(tmp_path, LAYER, parts | ({} if alpha is None else {"alpha": torch.tensor(alpha)}))
    (update,) = read_lora(path).values()
    rank = next(parts[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in parts)
    expected = as_lokr(parts) * (1 if alpha is None else alpha / rank)
    torch.testing.assert_close(low_rank_delta(update).double(), expected, rtol=1e-4, atol=1e-5)
    assert update.rank == torch.linalg.matrix_rank(expected)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ("LoHaConfig", {"r": 3, "alpha": 6}),
        ("LoKrConfig", {"r": 2, "alpha": 6, "decompose_both": True, "decompose_factor": 8}),
        ("LoKrConfig", {"r": 2, "alpha": 6, "decompose_factor": 4}),
    ],
)
def test_it_is_what_peft_adds(config: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    wrapped = get_peft_model(model, getattr(peft, config)(target_modules=["0"], init_weights=False, **settings))
    layer = wrapped.base_model.model[0]
    ends = {name.rpartition(".default")[0]: value.detach() for name, value in layer.named_parameters()}
    parts = {name: value for name, value in ends.items() if name.startswith(("hada", "lokr"))}
    path = saved(tmp_path, LAYER, parts | {"alpha": torch.tensor(float(settings["alpha"]))})
    (update,) = read_lora(path).values()
    expected = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(low_rank_delta(update), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["loha", "lokr", "full"])
def test_a_fused_layer_is_split_by_its_rows(kind: str, tmp_path: Path) -> None:
    parts = {
        "loha": loha(72, 24),
        "lokr": lokr((6, 4), (12, 1, 6)),
        "full": {"diff": numbers(72, 3) @ numbers(3, 24, seed=1)},
    }[kind]
    whole = {"loha": as_loha, "lokr": as_lokr, "full": lambda found: found["diff"].double()}[kind](parts)
    found = read_lora(saved(tmp_path, QKV, parts))
    assert list(found) == [f"transformer.transformer_blocks.0.attn.to_{each}" for each in "qkv"]
    for update, expected in zip(found.values(), whole.chunk(3), strict=True):
        torch.testing.assert_close(low_rank_delta(update).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(Version(diffusers.__version__) < Version("0.42"), reason="Older ones load no LoKr.")
def test_a_lokr_is_what_diffusers_loads(tmp_path: Path) -> None:
    pipe = tiny_pipeline("FLUX.2 klein")
    layer = "diffusion_model.single_blocks.1.linear2"  # 32 rows, 128 wide
    path = saved(tmp_path, layer, lokr((4, 4), (8, 2, 32)) | {"alpha": torch.tensor(3.0)})
    ((site, update),) = read_lora(path).items()
    pipe.load_lora_weights(str(path))
    loaded = linear_layers(pipe.components)[site]
    expected = loaded.get_delta_weight(loaded.active_adapters[0])
    torch.testing.assert_close(low_rank_delta(update), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_full_difference_of_low_rank_is_read_as_exactly_as_its_numbers(
    dtype: torch.dtype, bias: bool, tmp_path: Path
) -> None:
    difference = (numbers(40, 3).double() @ numbers(3, 30, seed=1).double()).to(dtype)
    parts = {"diff": difference} | ({"diff_b": torch.zeros(40, dtype=dtype)} if bias else {})
    (update,) = read_lora(saved(tmp_path, LAYER, parts)).values()
    assert update.rank == 3
    error = (low_rank_delta(update).double() - difference.double()).norm() / difference.double().norm()
    assert error < 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def test_a_full_difference_of_a_1_x_1_convolution(tmp_path: Path) -> None:
    difference = (numbers(16, 2) @ numbers(2, 12, seed=1))[:, :, None, None]
    (update,) = read_lora(saved(tmp_path, "lora_unet_mid_block_attentions_0_proj_in", {"diff": difference})).values()
    assert (update.rank, update.convolution) == (2, True)
    torch.testing.assert_close(low_rank_delta(update), difference[:, :, 0, 0], rtol=1e-4, atol=1e-5)


def test_differences_of_0_say_nothing(tmp_path: Path) -> None:
    """Trainers write them of norms and biases that they did not train."""
    parts = loha(20, 24)
    tensors = {f"{LAYER}.{part}": tensor for part, tensor in parts.items()}
    tensors |= {"lora_unet_blocks_0_norm.diff": torch.zeros(8), f"{LAYER[:-4]}wq.diff_b": torch.zeros(8)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert list(read_lora(tmp_path / "x.safetensors")) == [SITE]


NONE = {
    "LoHa of a high rank": (loha(600, 600, (17, 17)), "LoHa"),
    "LoHa of a rank as high as the layer": (loha(9, 24), "LoHa"),
    "LoHa of another height": (loha(20, 24) | {"hada_w2_a": numbers(21, 3)}, "LoHa"),
    "LoHa of another width": (loha(20, 24) | {"hada_w2_b": numbers(3, 23)}, "LoHa"),
    "LoHa of halves that do not fit": (loha(20, 24) | {"hada_w2_b": numbers(2, 24)}, "LoHa"),
    "LoHa without a quarter": ({k: v for k, v in loha(20, 24).items() if k != "hada_w1_b"}, "LoHa"),
    "LoHa with a core": (loha(20, 24) | {"hada_t1": numbers(3, 3, 1, 1), "hada_t2": numbers(3, 3, 1, 1)}, "LoHa"),
    "LoHa with DoRA": (loha(20, 24) | {"dora_scale": numbers(20, 1)}, "DoRA"),
    "LoHa with several alphas": (loha(20, 24) | {"alpha": numbers(2)}, "LoHa"),
    "LoHa of integers": ({name: tensor.int() for name, tensor in loha(20, 24).items()}, "LoHa"),
    "LoKr of two whole factors": (lokr((8, 8), (16, 16)), "LoKr"),
    "LoKr of a high rank": (lokr((64, 64), (8, 5, 8)), "LoKr"),
    "LoKr of more rows than any layer has": (lokr((512, 2), (512, 1, 4)), "LoKr"),
    "LoKr of one factor": ({"lokr_w1": numbers(4, 4)}, "LoKr"),
    "LoKr of a factor twice": (lokr((4, 4), (8, 2, 8)) | {"lokr_w2": numbers(8, 8)}, "LoKr"),
    "LoKr of halves that do not fit": (lokr((4, 4), (8, 2, 8)) | {"lokr_w2_b": numbers(3, 8)}, "LoKr"),
    "LoKr with a core": (lokr((4, 4), (8, 2, 8)) | {"lokr_t2": numbers(2, 2, 1, 1)}, "LoKr"),
    "a full difference of high rank": ({"diff": numbers(40, 30)}, "full differences (LyCORIS, ComfyUI), which are no"),
    "a full difference above the highest rank": (
        {"diff": numbers(600, HIGHEST_RANK + 1) @ numbers(HIGHEST_RANK + 1, 600, seed=1)},
        "full differences",
    ),
    "a full difference nearly of low rank": (
        {"diff": numbers(40, 2) @ numbers(2, 30, seed=1) + 1e-4 * numbers(40, 30, seed=2)},
        "full differences",
    ),
    "a full difference without end": ({"diff": numbers(40, 1) @ torch.full((1, 30), torch.inf)}, "full differences"),
    "a 3 x 3 convolution": ({"diff": numbers(8, 8, 3, 3)}, "full differences"),
    "a bias": ({"diff": numbers(40, 1) @ numbers(1, 30), "diff_b": numbers(40)}, "full differences of biases"),
    "a norm": ({"diff": numbers(40)}, "full differences"),
}


@pytest.mark.parametrize("case", NONE)
def test_what_is_of_no_low_rank_is_refused_by_name(case: str, tmp_path: Path) -> None:
    parts, told = NONE[case]
    path = saved(tmp_path, LAYER, parts)
    found = read_foreign(path)
    assert (found.lora, told in " / ".join(found.defects)) == ({}, True)
    assert "made for" not in " / ".join(found.defects)
    assert "no known meaning" not in " / ".join(found.defects) or case == "LoHa with several alphas"
    with pytest.raises(EDLoRAFormatError):
        read_lora(path)


def test_a_layer_that_has_an_ordinary_lora_as_well_is_refused_and_not_read_by_half(tmp_path: Path) -> None:
    both = loha(20, 24) | {"lora_down.weight": numbers(2, 24), "lora_up.weight": numbers(20, 2)}
    with pytest.raises(EDLoRAFormatError, match=rf"LoHa .*: 4 \({LAYER}\.hada_w1_a"):
        read_lora(saved(tmp_path, LAYER, both))


def test_of_a_lokr_with_whole_factors_the_reason_is_told(tmp_path: Path) -> None:
    (defect,) = read_foreign(saved(tmp_path, LAYER, lokr((8, 8), (16, 16)) | {"alpha": torch.tensor(1.0)})).defects
    assert "only if the product of both ranks is at most 256 and below the layer's size" in defect


def test_a_file_of_many_layers_is_read_whole(tmp_path: Path) -> None:
    tensors = {
        f"lora_unet_blocks_{n}_attn_gate.{part}": tensor.clone()
        for n in range(30)
        for part, tensor in loha(20, 24).items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    assert len(read_foreign(tmp_path / "x.safetensors").lora) == 30


def test_a_small_file_does_not_become_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers fit what all may have together; the others are told."""
    monkeypatch.setattr(lycoris, "MOST_NUMBERS", 1000)
    tensors = {
        f"lora_unet_blocks_{n}_attn_gate.{part}": tensor.clone()
        for n in range(5)
        for part, tensor in loha(20, 24).items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_foreign(tmp_path / "x.safetensors")
    assert len(found.lora) == 3  # of 396 numbers each
    assert found.defects[0].startswith("LoHa")
    assert ": 8 (lora_unet_blocks_3_attn_gate.hada_w1_a, " in found.defects[0]


@pytest.mark.parametrize("method", ["loha", "lokr"])
@pytest.mark.parametrize(
    ("family", "to"),
    [
        (STABLE_DIFFUSION, "diffusers"),
        (STABLE_DIFFUSION, "kohya"),
        (STABLE_DIFFUSION_XL, "diffusers"),  # kohya's names of blocks are those of SDXL's size alone
    ],
    ids=["convolutions", "convolutions in kohya's names", "linear projections"],
)
def test_1_x_1_convolutions_stay_what_they_are(family: Family, to: str, method: str, tmp_path: Path) -> None:
    """Neither method's matrices tell; stock diffusers refuses factors of the other kind."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(location_of(family.models[-1].id))
    layers = {site: layer for site, layer in linear_layers(pipe.components).items() if site.startswith("unet.down")}
    wanted = ("proj_in", "proj_out", "conv_shortcut", "attn2.to_k")
    sites = {site: tuple(layer.weight.shape[:2]) for site, layer in layers.items() if site.endswith(wanted)}
    tensors = {
        f"lora_{site.replace('.', '_')}.{part}": tensor.contiguous()
        for site, (out, width) in sites.items()
        for part, tensor in (
            loha(out, width, (1, 1)) if method == "loha" else lokr((2, 2), (out // 2, 1, width // 2))
        ).items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    file = convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", to).files[0]
    lora = read_lora(tmp_path / "x.safetensors")
    for site, layer in layers.items():
        if site in sites:
            assert lora[site].convolution == isinstance(layer, nn.Conv2d), site
    pipe.load_lora_weights(str(file))
    assert pipe.get_list_adapters()["unet"]
