"""Plain LoRAs of every family are fused with its pipeline of diffusers, which loads what comes out."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from diffusers_mixofshow import GradientFuser, LoRASource, cli
from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import ConfigurationError, FusionError
from diffusers_mixofshow.families import FAMILIES, Family
from diffusers_mixofshow.families.layers import linear_layers
from diffusers_mixofshow.interop.lora_files import read_lora, write_lora
from diffusers_mixofshow.sampling.loading import load_base
from families.pipelines import features_of, tiny_pipeline


RIDGE = 3e-2
SMALL = {"steps": 2, "height": 32, "width": 32, "ridge": RIDGE, "batch_size": 2}
PROMPTS = {"dog": ["photo of sks dog", "sks dog on a beach"], "ink": ["a castle, ink drawing"]}
# The pack's file holds float32 here; its factors have been through one rounding. Statistics are kept in float16.
ROUNDING, HALF = 1e-4, 3e-3


@pytest.fixture(
    scope="module",
    params=[family for family in FAMILIES if hasattr(diffusers, family.pipeline)],
    ids=lambda family: family.name,
)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def pipe(family: Family) -> Any:
    return tiny_pipeline(family.name)


def _sites(family: Family, pipe: Any) -> list[str]:
    """One layer for every input of the first of each kind of block, so that the test is quick."""
    chosen: dict[tuple[str, str], str] = {}
    for site, layer in linear_layers(pipe.components).items():
        if isinstance(layer, torch.nn.Linear):
            kind = re.sub(r"\.\d+(?=\.)", "", site)
            chosen.setdefault((kind, family.input_of(site) if "modulation" in site else ""), site)
    return list(chosen.values())


def _lora(family: Family, pipe: Any, seed: int, rank: int, alpha: float) -> dict[str, LowRank]:
    generator, layers = torch.Generator().manual_seed(seed), linear_layers(pipe.components)
    return {
        site: LowRank(
            down=torch.randn(rank, layers[site].in_features, generator=generator) * 0.1,
            up=torch.randn(layers[site].out_features, rank, generator=generator) * 0.1,
            alpha=alpha,
        )
        for site in _sites(family, pipe)
    }


@pytest.fixture(scope="module")
def files(family: Family, pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRA files as diffusers writes them, of different ranks."""
    folder = tmp_path_factory.mktemp(family.name.replace(" ", "-"))
    paths = {}
    for seed, (name, rank) in enumerate({"dog": 2, "ink": 3}.items()):
        tensors = {}
        for site, update in _lora(family, pipe, seed, rank, float(rank)).items():
            tensors[f"{site}.lora_A.weight"], tensors[f"{site}.lora_B.weight"] = update.down, update.up
        paths[name] = folder / f"{name}.safetensors"
        save_file(tensors, paths[name])
    return paths


def _sources(files: Mapping[str, Path]) -> list[LoRASource]:
    return [LoRASource(path, prompts=PROMPTS[name]) for name, path in files.items()]


def test_fused_layers_are_the_dense_solution(
    family: Family, pipe: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    """D (sum_i G_i / 2 + ridge I) = sum_i D_i G_i / 2 with G_i the mean outer product of what layer and LoRA saw."""
    sites, fuser = (
        _sites(family, pipe),
        GradientFuser(pipe, sequential=False, dtype=torch.float32, statistics_bytes=None, **SMALL),
    )
    before = {name: value.clone() for name, value in pipe.components[family.denoiser].state_dict().items()}
    grams, deltas = [], []
    for name, source in zip(files, _sources(files), strict=True):
        with features_of(pipe, sites) as features:
            fuser.record(source)
        rows = {site: torch.cat(parts) for site, parts in features.items()}
        grams.append({site: one.T @ one / len(one) for site, one in rows.items()})
        deltas.append({site: low_rank_delta(update).double() for site, update in read_lora(files[name]).items()})
    fused = fuser.fuse(_sources(files))
    assert set(fused.lora) == set(sites)
    for site in sites:
        total = sum(gram[site] / 2 for gram in grams)
        asked = sum(delta[site] @ gram[site] / 2 for delta, gram in zip(deltas, grams, strict=True))
        damped = total + RIDGE * total.diagonal().mean() * torch.eye(len(total), dtype=torch.float64)
        expected = torch.linalg.solve(damped, asked.T).T
        found = low_rank_delta(fused.lora[site]).double()
        assert (found - expected).norm() < HALF * expected.norm(), site
    after = pipe.components[family.denoiser].state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("settings", [{}, {"sequential": False}, {"ridge": "auto"}, {"prior": 0.5}], ids=str)
def test_sketches_of_all_inputs_give_what_whole_matrices_give(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sketch of as many directions as the tiny layers are wide loses nothing."""
    family = next(one for one in FAMILIES if one.name == "FLUX.1")
    pipe, given = tiny_pipeline(family.name), SMALL | {"statistics_bytes": None} | settings
    sources = []
    for seed, name in enumerate(PROMPTS):
        write_lora(tmp_path / f"{name}.safetensors", _lora(family, pipe, seed, 2, 2.0))
        sources.append(LoRASource(tmp_path / f"{name}.safetensors", prompts=PROMPTS["dog"]))
    whole = GradientFuser(pipe, statistics=tmp_path / "whole", dtype=torch.float32, **given).fuse(sources)
    for module in ("statistics", "team"):
        monkeypatch.setattr(f"diffusers_mixofshow.fusion.{module}.WIDEST_MATRIX", 0)
    monkeypatch.setattr("diffusers_mixofshow.fusion.sketch.DIRECTIONS", 10**6)
    sketched = GradientFuser(pipe, statistics=tmp_path / "sketched", dtype=torch.float32, **given).fuse(sources)
    if settings.get("ridge") == "auto":  # two ridges may be as good as each other
        errors = [each.training["fusion"]["layers"] for each in (whole, sketched)]
        for site, numbers in errors[0].items():
            assert errors[1][site]["held_out_residual"] == pytest.approx(numbers["held_out_residual"], abs=0.02), site
        return
    for site, update in whole.lora.items():
        expected, found = low_rank_delta(update), low_rank_delta(sketched.lora[site])
        assert (found - expected).norm() < 10 * HALF * expected.norm(), site


def test_in_stages_it_is_one_ordinary_lora_that_diffusers_loads(
    family: Family, pipe: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    fused = GradientFuser(pipe, dtype=torch.float32, **SMALL).fuse(_sources(files))
    assert fused.report.residuals.keys() == PROMPTS.keys()
    fused.save_pretrained(tmp_path / "both")
    pipe.load_lora_weights(tmp_path / "both")
    try:
        layers = linear_layers(pipe.components)
        for site, update in fused.lora.items():
            ((name, down),) = layers[site].lora_A.items()
            arrived = layers[site].scaling[name] * layers[site].lora_B[name].weight @ down.weight
            expected = low_rank_delta(update)
            assert (arrived - expected).norm() < ROUNDING * expected.norm(), site
    finally:
        pipe.unload_lora_weights()
    ours = read_lora(tmp_path / "both" / "pytorch_lora_weights.safetensors")
    assert ours.keys() == fused.lora.keys()


def test_what_is_loaded_already_would_be_recorded_as_the_base(
    family: Family, pipe: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    pipe.load_lora_weights(files["ink"])
    try:
        with pytest.raises(FusionError, match=r"has LoRAs loaded .*unload_lora_weights\(\) first"):
            GradientFuser(pipe, **SMALL).fuse(_sources(files))
    finally:
        pipe.unload_lora_weights()


def test_projections_that_are_read_as_one_are_told_before_anything_is_recorded(
    family: Family, files: dict[str, Path]
) -> None:
    fresh = tiny_pipeline(family.name)  # diffusers leaves the copies of some behind
    denoiser, passes = fresh.components[family.denoiser], []
    if family.name in ("Qwen-Image", "Z-Image"):
        pytest.skip("nothing that could be read as one, or a call that does nothing")
    denoiser.fuse_qkv_projections()
    denoiser.register_forward_pre_hook(lambda *_: passes.append(1))
    fuser = GradientFuser(fresh, statistics_bytes=None, **SMALL)
    advice = rf"copies.*pipe\.{family.denoiser}\.unfuse_qkv_projections\(\)"
    with pytest.raises(ConfigurationError, match=advice):
        fuser.fuse(_sources(files))
    assert not passes
    denoiser.unfuse_qkv_projections()
    assert fuser.fuse(_sources(files)).lora


def test_the_command_line_fuses_them_on_a_base_of_their_family(
    family: Family, pipe: Any, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No option says which family it is; files and folder do. What has no option, size and steps, is small here."""
    pipe.save_pretrained(tmp_path / "base")
    original = GradientFuser.__init__
    monkeypatch.setattr(GradientFuser, "__init__", lambda self, pipe, **given: original(self, pipe, **(SMALL | given)))
    asked = [part for name in files for part in ("--prompts", " | ".join(PROMPTS[name]))]
    arguments = [*map(str, files.values()), *asked, "--base", str(tmp_path / "base")]
    result = CliRunner().invoke(
        cli.app, ["fuse", *arguments, "--output", str(tmp_path / "both")], catch_exceptions=False
    )
    assert "Wrote the fused pack of dog, ink to" in result.output
    assert read_lora(tmp_path / "both" / "pytorch_lora_weights.safetensors").keys() == set(_sites(family, pipe))


def test_a_base_that_was_saved_without_a_part_is_loaded_without_it(tmp_path: Path) -> None:
    """Stable Diffusion 3 without its T5, which is most of its memory: diffusers wants to be told once more."""
    whole = tiny_pipeline("Stable Diffusion 3")
    spared = type(whole)(**{**whole.components, "text_encoder_3": None, "tokenizer_3": None})
    spared.save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path), concepts=False)
    assert type(loaded) is type(whole)
    assert loaded.text_encoder_3 is None
    assert loaded.text_encoder_2 is not None


def test_a_plan_counts_what_recording_keeps(
    family: Family, pipe: Any, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of float64: a matrix of each narrow input, of each wide one a sketch; passes of each stage."""
    widest = 20
    for module in ("sketch", "statistics", "team"):
        monkeypatch.setattr(f"diffusers_mixofshow.fusion.{module}.WIDEST_MATRIX", widest)
    monkeypatch.setattr("diffusers_mixofshow.fusion.sketch.DIRECTIONS", 5)
    layers, by_input = linear_layers(pipe.components), family.by_input(_sites(family, pipe))
    widths = [layers[sites[0]].in_features for sites in by_input.values()]
    numbers = sum(width * width if width <= widest else 5 * width for width in widths)
    asked = [part for name in files for part in ("--prompts", " | ".join(PROMPTS[name]))]
    arguments = [*map(str, files.values()), *asked, "--base", "some/base", "--output", str(tmp_path / "x")]
    result = CliRunner().invoke(cli.app, ["fuse", *arguments, "--dry-run", "--json"], catch_exceptions=False)
    told = json.loads(result.stdout)
    assert told["memory for statistics"] == f"{8 * len(files) * numbers / 1e6:.0f} MB at most"
    one_step_stages = sum(stage.text_alone for stage in family.stages)
    assert str((20 + one_step_stages) * len(files)) in told["time"]


def test_loras_of_two_families_are_told_apart(
    family: Family, pipe: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    other = {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": 768}
    if family.denoiser == "unet":
        other = {"transformer.single_transformer_blocks.0.proj_mlp": 32}
    tensors = {}
    for site, width in other.items():
        tensors |= {f"{site}.lora_A.weight": torch.ones(1, width), f"{site}.lora_B.weight": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "other.safetensors")
    strange = LoRASource(tmp_path / "other.safetensors", prompts=["sks"], name="other")
    told = (
        r"no family of base models has all of the layers that they change "
        rf"\(dog for {family.name}, ink for {family.name}, other for .*\)"
    )
    with pytest.raises(FusionError, match=told):
        GradientFuser().fuse([*_sources(files), strange], method="average")


def test_a_pipeline_of_another_family_is_one_error_that_names_both(
    family: Family, pipe: Any, files: dict[str, Path]
) -> None:
    """Before anything is recorded, whether one source is given or all of them."""
    other = "FLUX.1" if family.denoiser == "unet" else "Stable Diffusion XL"
    strange = tiny_pipeline(other)
    strange.components["unet" if other != "FLUX.1" else "transformer"].register_forward_pre_hook(
        lambda *_: pytest.fail("Something was recorded.")
    )
    fuser = GradientFuser(strange, **SMALL)
    told = rf"the base model is one of {re.escape(other)}, whose layers are others than those of dog for "
    name = re.escape(family.name)
    for act, sources in (
        (lambda: fuser.fuse(_sources(files)), rf"{name}, ink for {name}"),
        (lambda: fuser.record(_sources(files)[0]), name),
    ):
        with pytest.raises(
            FusionError, match=rf"^These LoRAs cannot be fused: {told}{sources}; give the base that they were tuned on"
        ) as e:
            act()
        assert len(str(e.value)) < 300


def _refuse_base(base: str, arguments: list[str]) -> str:
    """The error of fusing with a base by name, which is the same in a dry run; the base is not loaded."""
    told = []
    for more in ([], ["--dry-run"]):
        result = CliRunner().invoke(cli.app, ["fuse", *arguments, "--base", base, *more])
        assert isinstance(result.exception, FusionError), result.exception
        told.append(str(result.exception))
    assert told[0] == told[1]
    return told[0]


def test_a_known_base_of_another_family_is_refused_before_it_is_loaded_and_in_a_dry_run(
    family: Family, files: dict[str, Path], tmp_path: Path
) -> None:
    strange = "FLUX.1" if family.denoiser == "unet" else "Stable Diffusion"
    other = next(one for one in FAMILIES if one.name == strange)
    asked = [part for name in files for part in ("--prompts", " | ".join(PROMPTS[name]))]
    told = _refuse_base(other.models[0].id, [*map(str, files.values()), *asked, "--output", str(tmp_path / "x")])
    assert told == (
        f"These LoRAs cannot be fused: the base model is one of {other.name}, whose layers are others than those of "
        f"dog for {family.name}, ink for {family.name}; give the base that they were tuned on"
    )


@pytest.mark.parametrize(
    ("width", "own", "base", "named"),
    [
        (768, "Stable Diffusion", "stabilityai/stable-diffusion-xl-base-1.0", "Stable Diffusion XL"),
        (2048, "Stable Diffusion XL", "toyland", "Stable Diffusion"),
        (2048, "Stable Diffusion XL", "stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion"),
    ],
)
def test_u_nets_whose_layers_have_the_same_names_are_told_apart_by_the_text_they_read(
    width: int, own: str, base: str, named: str, tmp_path: Path
) -> None:
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{site}.lora_A.weight": torch.ones(1, width), f"{site}.lora_B.weight": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "dog.safetensors")
    asked = [str(tmp_path / "dog.safetensors"), "--prompts", "sks dog", "--output", str(tmp_path / "x")]
    told = _refuse_base(base, asked)
    assert f"the base model is one of {named}, whose layers are others than those of dog for {own};" in told


def test_a_layer_that_the_model_lacks_and_one_of_another_width_are_told_with_the_source(
    family: Family, pipe: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    lora = read_lora(files["dog"])
    site = next(name for name in lora if ".0." in name and name.startswith(family.denoiser))
    beyond = site.replace(".0.", ".7.", 1)
    wider = dataclasses.replace(lora[site], down=torch.ones(1, 2 * lora[site].down.shape[1]), up=lora[site].up[:, :1])
    write_lora(tmp_path / "odd.safetensors", lora | {site: wider, beyond: lora[site]})
    odd = LoRASource(tmp_path / "odd.safetensors", prompts=["a castle"])
    with pytest.raises(FusionError) as told:
        GradientFuser(pipe, **SMALL).fuse([odd, _sources(files)[1]])
    for part in (
        "odd: The plain LoRA does not fit the model",
        "model does not have: 1",
        beyond,
        "another (out, in) size",
    ):
        assert part in str(told.value)


def test_statistics_of_another_width_are_told_and_nothing_is_written(
    family: Family, pipe: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    fuser = GradientFuser(pipe, sequential=False, statistics=tmp_path / "statistics", **SMALL)
    copies = {name: Path(shutil.copy(path, tmp_path)) for name, path in files.items()}  # without statistics beside
    dog, ink = _sources(copies)
    for source, beside in ((dog, ink), (ink, dog)):
        fuser.record(source, alongside=[beside])
    for path in (tmp_path / "statistics").iterdir():
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        narrower = {
            name: value[..., : value.shape[-1] // 2].contiguous() if name.endswith("|rows") else value
            for name, value in tensors.items()
        }
        save_file(narrower, path, metadata=metadata)
    with pytest.raises(FusionError, match=r"Statistics of .* must be .* recorded on another model"):
        GradientFuser(statistics=tmp_path / "statistics", sequential=False, ridge=RIDGE).fuse([dog, ink])
