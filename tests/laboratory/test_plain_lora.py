"""Plain LoRAs of the second base: files of diffusers, fused on the base whose guidance they are recorded with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.toyland_base import plain_lora
from benchmarks.toyland_base.plain_lora import Tuning, draw_class, encode_pictures, main, tune
from diffusers_mixofshow import GradientFuser, LoRASource
from diffusers_mixofshow.edlora.file import PLAIN_NAME
from diffusers_mixofshow.interop.lora_files import read_lora
from diffusers_mixofshow.sampling.loading import load_base
from diffusers_mixofshow.toyland.concepts import CONCEPTS
from diffusers_mixofshow.toyland.scenes import residents


QUICK = ("--steps", "2", "--batch-size", "2", "--class-pictures", "1", "--rank", "2")
NAMES = ("rex", "ming")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_base("toyland-sd3", "cpu", "float32", concepts=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    main(["--output", str(folder), "--names", *NAMES, *QUICK])
    return {name: folder / f"{name}.safetensors" for name in NAMES}


def test_every_lora_adapts_the_attention_of_both_streams(files: dict[str, Path]) -> None:
    sites = read_lora(files["rex"]).keys()
    assert len(sites) == 5 * 8 - 1  # the last block does not put out its texts
    assert all(site.startswith("transformer.transformer_blocks.") and ".attn." in site for site in sites)


def test_pictures_of_the_class_show_other_things_of_it() -> None:
    pictures, captions = draw_class("dog", seed=0)
    assert len(pictures) == len(captions) == 64
    assert {picture.size for picture in pictures} == {(64, 64)}
    named = {name for name, thing in residents().items() if thing.class_word == "dog"}
    assert all({"dog", *named} & set(re.findall(r"\w+", one)) for one in captions)


def test_a_file_that_is_there_is_kept(files: dict[str, Path]) -> None:
    before = files["rex"].read_bytes()
    main(["--output", str(files["rex"].parent), "--names", "rex", *QUICK, "--seed", "7"])
    assert files["rex"].read_bytes() == before


def test_they_are_fused_with_the_guidance_of_their_base(pipe: Any, files: dict[str, Path], tmp_path: Path) -> None:
    sources = [LoRASource(path, prompts=[f"a {name} in snow"], name=name) for name, path in files.items()]
    fused = GradientFuser(pipe, steps=1, height=32, width=32).fuse(sources)
    assert fused.report.data["guidance_scale"] == 3.0
    assert fused.report.data["sampler"] == "FlowMatchEulerDiscreteScheduler"
    fused.save_pretrained(tmp_path)
    assert read_lora(tmp_path / PLAIN_NAME).keys() == read_lora(files["rex"]).keys()
    plain = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(tmp_path)
    pipe.unload_lora_weights()
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, plain[name]), name


def test_pictures_of_the_class_stand_in_every_batch_behind_the_photos(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its own caption, which does not call the concept."""
    batches: list[tuple[torch.Tensor, ...]] = []

    class Objective(plain_lora.FlowObjective):
        def forward(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
            batches.append(batch)
            return super().forward(batch)

    monkeypatch.setattr(plain_lora, "FlowObjective", Objective)
    tune(pipe, CONCEPTS["rex"], tmp_path / "rex.safetensors", Tuning(steps=3, batch_size=2, class_pictures=4, rank=2))
    latents, captions = encode_pictures(pipe, *draw_class("dog", seed=0))
    assert [len(clean) for clean, *_ in batches] == [6, 6, 6]
    for clean, _, _, token_ids in batches:
        named = ["rex dog" in text for text in pipe.tokenizer.batch_decode(token_ids, skip_special_tokens=True)]
        known = [
            any(
                torch.equal(ids, own) and torch.equal(one, latent)
                for own, latent in zip(captions, latents, strict=True)
            )
            for one, ids in zip(clean, token_ids, strict=True)
        ]
        assert named[:2] == known[2:4] == known[4:] == [True, True]
        assert known[:2] == [False, False]
    assert len({one for clean, *_ in batches for one in clean[2:].mean(dim=(1, 2, 3)).tolist()}) > 4
