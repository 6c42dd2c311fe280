"""What `--dry-run` tells, line by line, beside numbers counted here."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import packs
import tiny
from diffusers_mixofshow import EDLoRA, GradientFuser, cli
from diffusers_mixofshow.base_models import TOYLAND, TOYLAND_XL, find_embedded, find_size
from diffusers_mixofshow.cli import timing
from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.errors import MixOfShowWarning
from diffusers_mixofshow.interop.lora_files import write_lora


INDEX = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
"""Index of a pipeline of Stable Diffusion, as far as its family is told by it."""


def plan(*arguments: object) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = [str(argument) for argument in (*arguments, "--dry-run", "--json")]
        return json.loads(CliRunner().invoke(cli.app, told, catch_exceptions=False).stdout)


@pytest.fixture
def rex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EDLoRA:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("rex", "tom")):
        packs.random_pack(tiny.components(), name, ranks=(2, 3), seed=number).save_pretrained(name)
    return EDLoRA.from_pretrained("rex")


HUB = "someone/tiny, from the Hub or its cache"
PASSES = "{} times that of one U-Net pass on your device; not measured, as no model is loaded"


def test_a_plan_of_sampling(rex: EDLoRA) -> None:
    numbers = sum(update.down.numel() + update.up.numel() for update in rex.lora.values())
    expected = {
        "base model": HUB,
        "concepts": "<rex>",
        "weight updates": f"{numbers:,} numbers",
        "strength of the updates": "1",
        "way": "text to image",
        "prompt": "a <rex>",
        "regions": 0,
        "isolation": "none",
        "size": "the model's own",
        "pictures": 1,
        "seeds": "0",
        "guidance": "7.5",
        "U-Net runs": "20, each on a batch of 2",
        "drafts": "none",
        "drawn anew": "none",
        "device": "cuda if there is one, else cpu",
        "dtype": "the device's usual one",
        "time": PASSES.format(20),
        "writes": "sample.png",
        "replaces": "nothing",
    }
    asked = ("sample", "--concepts", "rex", "--prompt", "a <rex>")
    assert plan(*asked) == expected
    changed = {
        ("--guidance", "1"): {"U-Net runs": "20, each on a batch of 1", "guidance": "1"},
        ("--guidance", "1.5"): {"guidance": "1.5"},
        ("--count", "2", "--seed", "7"): {
            "pictures": 2, "seeds": "7, 8", "U-Net runs": "20, each on a batch of 4",
            "writes": "sample-0.png, sample-1.png",
        },
        ("--steps", "3"): {"U-Net runs": "3, each on a batch of 2", "time": PASSES.format(3)},
        ("--width", "64"): {"size": "64 x the model's own pixels"},
        ("--height", "64"): {"size": "the model's own x 64 pixels"},
        ("--width", "40", "--height", "64"): {"size": "40 x 64 pixels"},
        ("--region", "0,0,1,1:a <rex>", "--isolation", "--isolation-scales", "2", "--count", "2", "--refine"): {
            "pictures": 2, "seeds": "0, 1", "U-Net runs": "20, each on a batch of 4", "regions": 1,
            "writes": "sample-0.png, sample-1.png", "isolation": "from 0 to 1 of the steps, maps of 2 cells",
            "drafts": "2 regions, 3 runs each", "after drafts": "a <rex>",
            "drawn anew": "2 regions, up to 6 runs each",
            "time": PASSES.format(20) + ", and drafts, and what is drawn anew",
        },
        ("--region", "0,0,1,1:a <rex>", "--isolation", "--no-draft"): {
            "regions": 1, "isolation": "from 0 to 1 of the steps, all feature maps",
        },
    }  # fmt: skip
    for more, difference in changed.items():
        assert plan(*asked, *more) == expected | difference, more


@pytest.mark.parametrize(
    ("base", "size"),
    [
        ("toyland", "64 x 64"),
        ("Toyland-SD3", "64 x 64"),
        (TOYLAND_XL, "96 x 96"),
        ("runwayml/stable-diffusion-v1-5", "512 x 512"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "1024 x 1024"),
        ("folder", "48 x 96"),
    ],
)
def test_a_plan_says_the_pixels_of_a_base_that_is_known(tmp_path: Path, monkeypatch, base: str, size: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "_measure", lambda *given, **more: 0.5)
    for name, told in (("unet", {"sample_size": [24, 12]}), ("vae", {"block_out_channels": [8, 8, 8]})):
        Path("folder", name).mkdir(parents=True)
        Path("folder", name, "config.json").write_text(json.dumps(told))
    Path("folder", "model_index.json").write_text(json.dumps(INDEX))
    asked = ("sample", "--prompt", "a dog", "--base", base)
    assert plan(*asked)["size"] == f"{size} pixels, the model's own"
    assert plan(*asked, "--width", "128")["size"] == f"128 x {size.split()[-1]} pixels"
    assert plan(*asked, "--width", "128", "--height", "64")["size"] == "128 x 64 pixels"


@pytest.mark.parametrize(
    "told", ["3", '{"sample_size": "x"}', '{"sample_size": [1, 2, 3]}', '{"sample_size": [1, "x"]}']
)
def test_a_size_that_cannot_be_read_is_not_told(tmp_path: Path, told: str) -> None:
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    (tmp_path / "unet" / "config.json").write_text(told)
    (tmp_path / "vae" / "config.json").write_text('{"block_out_channels": [8]}')
    assert find_size(str(tmp_path)) is None


def test_a_plan_of_fusion(rex: EDLoRA) -> None:
    tom = EDLoRA.from_pretrained("tom")
    sizes = {site: (update.up.shape[0], update.down.shape[1]) for site, update in rex.lora.items()}
    ranks = {site: update.rank + tom.lora[site].rank for site, update in rex.lora.items()}
    rows = sum(each.numel() for pack in (rex, tom) for each in pack.embeddings.values())

    def numbers(most: int) -> int:
        return rows + sum(min(ranks[site], most, *size) * sum(size) for site, size in sizes.items())

    def told(most: int) -> str:
        return f"{numbers(most):,} numbers, {2 * numbers(most) / 1e6:.1f} MB in float16; embeddings come on top"

    # Queries, keys and values of one self-attention see one input; each input of each concept has a Gram matrix.
    inputs = {
        re.sub(r"(attn1|self_attn)\.(to_[qkv]|[qkv]_proj)$", r"\1", site): size[1] for site, size in sizes.items()
    }
    inputs = {re.sub(r"attn2\.to_[kv]$", "attn2.kv", site): width for site, width in inputs.items()}
    own = sum(width**2 for width in inputs.values()) * 8 * 2 / 1e6
    expected = {
        "sources": [
            f"{name}: ED-LoRA of an unknown base, names of diffusers-mixofshow, rank 2 and 3, {len(sizes)} layers, "
            "tuned on someone/tiny"
            for name in ("rex", "tom")
        ],
        "concepts": "<rex>, <tom>",
        "base model": HUB,
        "layers": len(sizes),
        "rank": f"at most {max(min(ranks[site], *sizes[site]) for site in sizes)}",
        # Two steps more, four batches of prompts.
        "U-Net runs": "88 at most, each on a batch of up to 8; bars count single pictures: 352",
        "time": PASSES.format(88),
        "pack": told(99),
        "writes": "both",
        "replaces": "nothing",
    }
    asked = ("fuse", "rex", "tom", "--output", "both")
    found = plan(*asked)
    memory = int(re.fullmatch(r"(\d+) MB at most", found.pop("memory for statistics"))[1])
    assert memory == round(own)
    assert found == expected
    cut = plan(*asked, "--max-rank", "3")
    assert (cut["rank"], cut["pack"]) == ("at most 3", told(3))
    own_runs = "80 at most, each on a batch of up to 8; bars count single pictures: 320"
    assert plan(*asked, "--features", "own")["U-Net runs"] == own_runs
    merged = plan(*asked, "--method", "average")
    assert (merged["base model"], merged["U-Net runs"]) == ("none is needed", "none")
    assert merged["memory for statistics"] == "that of the files beside the sources"
    assert merged["time"] == f"that of solving {len(sizes)} layers; no model runs"


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_methods_that_leave_full_rank_are_planned_at_their_size_and_warned_of(rex, method, monkeypatch) -> None:
    """Of the file before it is made; and by Python, too. Small files are not worth a warning."""
    tom = EDLoRA.from_pretrained("tom")
    rows = sum(each.numel() for pack in (rex, tom) for each in pack.embeddings.values())
    sizes = {site: (update.up.shape[0], update.down.shape[1]) for site, update in rex.lora.items()}
    most = max(update.rank + tom.lora[site].rank for site, update in rex.lora.items())
    numbers = sum(min(size) * sum(size) for size in sizes.values())
    asked = ("fuse", "rex", "tom", "--output", "both", "--method", method)
    found = plan(*asked)
    assert found["rank"] == f"at most {max(map(min, sizes.values()))}"
    assert found["pack"].startswith(f"{numbers + rows:,} numbers")
    monkeypatch.setattr("diffusers_mixofshow.fusion.size._LARGE", 0)
    told = rf"'{method}' changes single values.*the file gets \d+ MB, .*max_rank={most} \(.*--max-rank {most}\)"
    with pytest.warns(MixOfShowWarning, match=told):
        CliRunner().invoke(cli.app, [*asked, "--dry-run"], catch_exceptions=False)
    with pytest.warns(MixOfShowWarning, match=told):
        GradientFuser().fuse([rex, tom], method=method)
    assert plan(*asked, "--max-rank", str(most))["rank"] == f"at most {most}"  # without a warning
    small = GradientFuser(max_rank=most).fuse([rex, tom], method=method)
    assert max(update.rank for update in small.lora.values()) == most


def test_the_rank_of_the_reduced_average_is_the_largest_of_the_sources(rex) -> None:
    largest = max(update.rank for update in rex.lora.values())
    assert plan("fuse", "rex", "tom", "--output", "both", "--method", "svd")["rank"] == f"at most {largest}"


def test_time_is_counted_of_the_passes_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def measured(folder: Path, batch: int, pixels: Any, *, backward: bool) -> float:
        assert folder == find_embedded()[TOYLAND]
        asked.append((batch, pixels, backward))
        return 0.25

    monkeypatch.setattr(timing, "_measure", measured)
    told = timing.estimate_time(TOYLAND, 40, 3, pixels=(64, 96), backward=True)
    assert told == (
        "at least 10 s on this CPU: 40 U-Net passes forward and backward of 250 ms, measured just now as the quickest "
        "of 3; texts, pictures and loading come on top, and other work of this machine"
    )
    assert timing.estimate_time(TOYLAND, 1, 2).startswith("at least 1 s on this CPU: 1 U-Net passes of 250 ms")
    assert timing.estimate_time(TOYLAND, 476, 2).startswith("at least 119 s ")
    assert timing.estimate_time(TOYLAND, 480, 2).startswith("at least 2 min ")
    assert timing.estimate_time(TOYLAND, 2400, 2).startswith("at least 10 min ")
    assert asked[:2] == [(3, (64, 96), True), (2, None, False)]
    assert timing.estimate_time("x", 7, 2, backward=True).startswith(
        "7 times that of one U-Net pass forward and backward on your"
    )


@pytest.mark.parametrize(
    ("pixels", "backward", "shape"), [(None, False, (2, 8, 16, 16)), ((64, 96), True, (2, 8, 16, 24))]
)
def test_a_pass_is_measured_at_the_size_of_the_pictures(monkeypatch, pixels, backward, shape) -> None:
    """The quickest of three passes counts, after one that is not timed."""
    from diffusers import UNet2DConditionModel

    forward, seen = UNet2DConditionModel.forward, []

    def noted(self: Any, sample: Any, step: Any, text: Any) -> Any:
        seen.append((tuple(sample.shape), tuple(text.shape), sample.requires_grad))
        return forward(self, sample, step, text)

    clock = iter([0, 9, 9, 16, 16, 18, 18, 23])
    monkeypatch.setattr(UNet2DConditionModel, "forward", noted)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing._measure(find_embedded()[TOYLAND], 2, pixels, backward=backward) == 2
    assert seen == [(shape, (2, 77, 128), backward)] * 4


def test_passes_of_the_embedded_base_with_two_encoders_are_measured_too(tmp_path: Path, monkeypatch) -> None:
    """At the size of its pictures: it makes 4 x 4 pixels of a cell, as Toyland's own decoder does."""
    from diffusers import UNet2DConditionModel

    forward, shapes = UNet2DConditionModel.forward, []

    def noted(self: Any, sample: Any, *given: Any, **more: Any) -> Any:
        shapes.append(tuple(sample.shape))
        return forward(self, sample, *given, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", noted)
    Image.new("RGB", (96, 96)).save(tmp_path / "photo.png")
    trained = ("train", tmp_path, "--concept", "rex", "--class-word", "dog", "--base", TOYLAND_XL, "--steps", "9")
    assert plan(*trained, "--output", tmp_path / "rex")["time"].startswith("at least ")
    assert {shape[1:] for shape in shapes} == {(8, 24, 24)}
    drawn = ("sample", "--base", TOYLAND_XL, "--prompt", "a dog", "--width", "64", "--height", "128")
    assert "measured just now" in plan(*drawn)["time"]
    assert shapes[-1] == (2, 8, 32, 16)


def test_passes_of_the_embedded_transformer_are_measured_too(monkeypatch) -> None:
    """With the texts of three encoders, of which the last is none: zeros."""
    from diffusers import SD3Transformer2DModel

    forward, seen = SD3Transformer2DModel.forward, []

    def noted(self: Any, sample: Any, text: Any, pooled: Any, step: Any) -> Any:
        seen.append((tuple(sample.shape), tuple(text.shape), tuple(pooled.shape), tuple(step.shape)))
        return forward(self, sample, text, pooled, step)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", noted)
    told = timing.estimate_time("toyland-sd3", 7, 2)
    assert re.match(r"at least \d+ s on this CPU: 7 transformer passes of \d+ ms, measured just now", told)
    assert seen == [((2, 8, 16, 16), (2, 333, 160), (2, 160), (2,))] * 4


def test_plans_of_drawing_call_the_denoiser_by_its_kind(rex: EDLoRA, monkeypatch) -> None:
    """U-Net or transformer as the base or what is loaded into it tells, else the model."""
    monkeypatch.setattr(timing, "_measure", lambda *given, **more: 0.5)
    update = LowRank(down=torch.randn(2, 160), up=torch.randn(160, 2), alpha=2.0)
    write_lora(Path("ink.safetensors"), {"transformer.transformer_blocks.0.attn.to_q": update})
    words = ("--trigger", "ink=ink", "--class-word", "ink=drawing")
    kinds = {
        ("sample", "--prompt", "x", "--base", "toyland-sd3"): "transformer",
        ("sample", "--prompt", "x", "--base", "toyland"): "U-Net",
        ("sample", "--prompt", "x", "--base", "someone/any"): "model",
        ("sample", "--prompt", "x", "--base", "someone/any", "--concepts", "rex"): "U-Net",
        ("sample", "--prompt", "x", "--base", "someone/any", "--concepts", "ink.safetensors"): "transformer",
        ("sample", "--prompt", "x", "--base", "black-forest-labs/FLUX.1-dev"): "transformer",
        ("evaluate", "ink.safetensors", "--base", "someone/any", *words): "transformer",
        ("compare", "rex", "tom", "--base", "someone/any"): "U-Net",
    }
    for asked, kind in kinds.items():
        told = plan(*asked)
        assert [name for name in told if name.endswith(" runs")] == [f"{kind} runs"], asked
        assert f" {kind} pass" in told["time"], asked


def test_plans_count_a_second_half_only_where_guidance_computes_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    flux, z_image = "black-forest-labs/FLUX.1-dev", "Tongyi-MAI/Z-Image-Turbo"
    for base, guidance, rows in (
        (flux, 3.5, 1), (flux, 1, 1), (z_image, 0, 1), (z_image, 0.5, 2), ("Qwen/Qwen-Image", 1, 1),
        ("Qwen/Qwen-Image", 4, 2), ("someone/any", 4, 2), ("someone/any", 1, 1),
    ):  # fmt: skip
        told = plan("sample", "--prompt", "x", "--base", base, "--guidance", guidance)
        assert next(told[name] for name in told if name.endswith(" runs")) == f"20, each on a batch of {rows}", base
    update = LowRank(down=torch.ones(2, 3072), up=torch.ones(3072, 2), alpha=2.0)
    write_lora(tmp_path / "ink.safetensors", {"transformer.transformer_blocks.0.attn.to_q": update})
    asked = ("evaluate", "ink.safetensors", "--base", flux, "--trigger", "ink=ink", "--class-word", "ink=drawing")
    assert plan(*asked)["transformer runs"].endswith(" for single pictures")
    assert plan(*asked[:3], "Qwen/Qwen-Image", *asked[4:])["transformer runs"].endswith(
        "each with and without guidance"
    )


def test_a_plan_of_fusing_plain_loras_of_a_transformer(tmp_path: Path, monkeypatch) -> None:
    """It speaks of no U-Net and no embeddings, counts only stages that have layers, and shows each one's prompts."""
    monkeypatch.chdir(tmp_path)
    sites = [f"transformer.transformer_blocks.{block}.attn.to_q" for block in range(2)]
    for name in ("bobo", "rex"):
        updates = {site: LowRank(down=torch.randn(2, 160), up=torch.randn(160, 2), alpha=2.0) for site in sites}
        write_lora(tmp_path / f"{name}.safetensors", updates)
    prompts = ("--prompts", "bobo critter | bobo critter in snow", "--prompts", "rex dog")
    asked = ("fuse", "bobo.safetensors", "rex.safetensors", *prompts, "--base", "toyland-sd3", "--output", "both")
    monkeypatch.setattr(timing, "_measure", lambda *given, **more: 0.5)
    told = plan(*asked)
    assert timing.estimate_time("x", 3, 2, model="transformer").startswith("3 times that of one transformer pass on")
    assert told["transformer runs"] == "40 at most, each on a batch of up to 8; bars count single pictures: 60"
    assert told["time"].startswith("at least 20 s on this CPU: 40 transformer passes of 500 ms")
    assert told["pack"] == "2,560 numbers, 0.0 MB in float16"
    assert "U-Net runs" not in told
    assert [line.partition("layers, ")[2] for line in told["sources"]] == [
        "prompts 'bobo critter'; ... (2)", "prompts 'rex dog' (1)"
    ]  # fmt: skip
    shown = CliRunner().invoke(cli.app, [*asked, "--dry-run"], catch_exceptions=False).stdout.splitlines()
    assert shown[0] == "sources:"
    assert [line.split(":")[0] for line in shown[1:4]] == ["  bobo.safetensors", "  rex.safetensors", "concepts"]
