"""Concepts of SDXL are fused as those of Stable Diffusion: both text encoders, all groups of layers, the vector."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import packs
from diffusers_mixofshow import EDLoRA, GradientFuser, LoRASource, MixOfShowXLPipeline
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.fusion.published import statistics_path
from diffusers_mixofshow.interop import write_lora
from families.pipelines import features_of, tiny_pipeline


PROMPTS = ["a <TOK>", "photo of a <TOK> at sea"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipeline = MixOfShowXLPipeline(**tiny_pipeline("Stable Diffusion XL").components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def fuser(pipe: Any) -> GradientFuser:
    return GradientFuser(pipe, steps=2, height=32, width=32, prompts=PROMPTS, ridge=1e-6)


def concept(pipe: Any, name: str, seed: int) -> EDLoRA:
    pack = packs.random_pack(pipe.components, name, ranks=(2,), seed=seed)
    small = {site: dataclasses.replace(update, up=update.up * 0.3) for site, update in pack.lora.items()}
    return dataclasses.replace(pack, lora=small)


@pytest.fixture(scope="module")
def two(pipe: Any) -> list[EDLoRA]:
    return [concept(pipe, "rex", 0), concept(pipe, "kit", 1)]


def drawn(pipe: Any, pack: EDLoRA, prompt: str) -> torch.Tensor:
    pipe.load_edlora(pack)
    try:
        settings = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}
        return pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).images
    finally:
        pipe.unload_edlora()


def test_one_concept_fused_is_itself(pipe: Any, fuser: GradientFuser, two: list[EDLoRA]) -> None:
    fused = fuser.fuse(two[:1])
    assert {name: rows.tolist() for name, rows in fused.embeddings.items()} == {
        name: rows.tolist() for name, rows in two[0].embeddings.items()
    }
    own = drawn(pipe, two[0], "a <rex>")
    assert (drawn(pipe, fused, "a <rex>") - own).abs().mean() < 0.02 * own.abs().mean()


def test_two_fused_are_nearer_to_each_than_their_average(
    pipe: Any, fuser: GradientFuser, two: list[EDLoRA], tmp_path: Path
) -> None:
    fused, average = fuser.fuse(two), fuser.fuse(two, method="average")
    parts = {name.partition("<")[0] for name in fused.embeddings}
    assert parts == {"", "text_encoder_2.", "pooled."}
    components = {site.partition(".")[0] for site in fused.lora}
    assert components == {"text_encoder", "text_encoder_2", "unet"}
    fused.save_pretrained(tmp_path)
    again = EDLoRA.from_pretrained(tmp_path)
    distances = []
    for pack, prompt in zip(two, ("a <rex>", "a <kit>"), strict=True):
        own = drawn(pipe, pack, prompt)
        far, near = ((drawn(pipe, other, prompt) - own).abs().mean() for other in (average, again))
        assert near < far, prompt
        distances.append(torch.stack([far, near]))
    far, near = sum(distances)  # of random weights, which other versions draw otherwise
    assert near < 0.85 * far


def test_each_layer_loses_less_than_by_averaging(fuser: GradientFuser, two: list[EDLoRA]) -> None:
    residuals = fuser.fuse(two).report.data["residuals"]["mean"]
    assert residuals.keys() == {"<rex>", "<kit>"}
    assert all(one["fused"] < 0.7 * one["average"] for one in residuals.values())


RECORDED = {"steps": 2, "height": 32, "width": 32, "prompts": PROMPTS, "ridge": 3e-2, "dtype": torch.float32}
ALONE = {"sequential": False, "statistics_bytes": None}
HALF = 3e-3
"""Statistics are kept in float16."""


def test_fused_layers_are_the_dense_solution(pipe: Any, two: list[EDLoRA]) -> None:
    """D (sum_i G_i / 2 + ridge I) = sum_i D_i G_i / 2 with G_i the mean outer product of what layer and concept saw.

    Keys and values see every group's own encodings, by both text encoders.
    """
    fuser, sites = GradientFuser(pipe, **ALONE, **RECORDED), list(two[0].lora)
    grams = []
    for pack in two:
        with features_of(pipe, sites) as features:
            fuser.record(pack)
        rows = {site: torch.cat(parts) for site, parts in features.items()}
        grams.append({site: one.T @ one / len(one) for site, one in rows.items()})
    fused = fuser.fuse(two)
    assert set(fused.lora) == set(sites)
    for site in sites:
        total = sum(gram[site] / 2 for gram in grams)
        asked = sum(
            low_rank_delta(pack.lora[site]).double() @ gram[site] / 2 for pack, gram in zip(two, grams, strict=True)
        )
        damped = total + RECORDED["ridge"] * total.diagonal().mean() * torch.eye(len(total), dtype=torch.float64)
        expected = torch.linalg.solve(damped, asked.T).T
        assert (low_rank_delta(fused.lora[site]).double() - expected).norm() < HALF * expected.norm(), site
    keys = "unet.{}.transformer_blocks.{}.attn2.to_k"
    first, second = (grams[0][keys.format("mid_block.attentions.0", number)] for number in (0, 1))
    torch.testing.assert_close(first, second)  # layers of one group read the same
    other = grams[0][keys.format("up_blocks.0.attentions.0", 0)]
    assert (other - first).norm() > HALF * first.norm()


def test_statistics_alone_fuse_what_the_pipeline_fuses(pipe: Any, two: list[EDLoRA], tmp_path: Path) -> None:
    folders = [tmp_path / "rex", tmp_path / "kit"]
    fuser = GradientFuser(pipe, **ALONE, **RECORDED)
    for pack, folder in zip(two, folders, strict=True):
        pack.save_pretrained(folder)
        fuser.record(folder)
        assert statistics_path(folder / "edlora.safetensors").is_file()
    without = GradientFuser(sequential=False, ridge=RECORDED["ridge"], dtype=torch.float32).fuse(folders)
    expected = fuser.fuse(two)
    assert without.lora.keys() == expected.lora.keys()
    for site, update in expected.lora.items():
        whole = low_rank_delta(update)
        assert (low_rank_delta(without.lora[site]) - whole).norm() < HALF * whole.norm(), site
    assert all(torch.equal(rows, without.embeddings[name]) for name, rows in expected.embeddings.items())


def test_a_concept_and_a_plain_lora_are_fused_together(
    pipe: Any, fuser: GradientFuser, two: list[EDLoRA], tmp_path: Path
) -> None:
    file = write_lora(tmp_path / "ink.safetensors", two[1].lora)
    fused = fuser.fuse([two[0], LoRASource(file, prompts=["ink drawing"])])
    assert [one.placeholder for one in fused.concepts] == ["<rex>"]
    own = drawn(pipe, two[0], "a <rex>")
    assert (drawn(pipe, fused, "a <rex>") - own).abs().mean() < own.abs().mean()
