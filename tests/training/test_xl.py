"""A concept of SDXL, tuned once with everything that may lie beside it; and what cannot be tuned."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from torch import nn

from diffusers_mixofshow import EDLoRA, EDLoRATrainer, GradientFuser, MixOfShowXLPipeline
from diffusers_mixofshow.cli.plans import plan_training
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowWarning
from diffusers_mixofshow.fusion.published import SourceStatistics, statistics_path
from diffusers_mixofshow.lora import merged
from diffusers_mixofshow.training import TrainingConfig
from diffusers_mixofshow.training.base import load_base, refuse_untrainable, warn_of_small_pictures
from diffusers_mixofshow.training.failures import explain_memory_errors
from diffusers_mixofshow.training.framing import Crop
from diffusers_mixofshow.training.latents import LatentEncoder
from diffusers_mixofshow.training.presets import PRESETS
from families.pipelines import tiny_pipeline
from short_training import quick, same


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_pipeline("Stable Diffusion XL")


@pytest.fixture(scope="module")
def tuned(base: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EDLoRA]:
    """A training with a sheet, checkpoints, statistics and pictures of the class."""
    folder = tmp_path_factory.mktemp("tuned")
    for place, size in (("photos", (48, 32)), ("men", (32, 32))):
        (folder / place).mkdir()
        for number, colour in enumerate(("red", "blue")[: 2 if place == "photos" else 1]):
            Image.new("RGB", size, colour).save(folder / place / f"{number}.png")
    settings = {
        **{"output_dir": folder / "out", "checkpointing_steps": 1, "save_statistics": True, "random_flip": True},
        **{"num_validation_images": 1, "class_data_dir": folder / "men", "train_batch_size": 1},
        **{"num_class_images": 2, "learning_rate": 0.1, "text_encoder_learning_rate": 0.1, "framing": "crop"},
    }
    with pytest.MonkeyPatch.context() as patch:  # the defaults take long
        fewer = partial(GradientFuser, steps=2, prompts=["a <TOK>"], height=32, width=32)
        patch.setattr("diffusers_mixofshow.training.statistics.GradientFuser", fewer)
        return folder, EDLoRATrainer(quick(folder / "photos", **settings), base).train()


def test_what_lies_beside_it(tuned: tuple[Path, EDLoRA]) -> None:
    out = tuned[0] / "out"
    names = {path.name for path in out.iterdir()}
    assert names >= {"README.md", "checkpoint-2", "checkpoint-3", "edlora.safetensors", "samples", "validation"}
    assert [path.name for path in sorted((out / "validation").iterdir())] == ["step-000003.png"]
    assert [path.name for path in sorted((tuned[0] / "men").iterdir())] == ["0.png", "class-0000.png"]
    with Image.open(tuned[0] / "men" / "class-0000.png") as drawn:
        assert drawn.size == (32, 32)
    with Image.open(out / "validation" / "step-000003.png") as sheet:
        rows = [sheet.crop((sheet.width - 36, top, sheet.width - 4, top + 32)).tobytes() for top in (20, 56, 92)]
    assert len(set(rows)) == 3
    assert same(EDLoRA.from_pretrained(out / "checkpoint-3"), tuned[1])


def test_its_file_is_of_format_2_and_is_read_by_a_pipeline_of_this_package(
    base: Any, tuned: tuple[Path, EDLoRA]
) -> None:
    with safe_open(tuned[0] / "out" / "edlora.safetensors", framework="pt") as opened:
        assert '"format_version": 2' in opened.metadata()["edlora"]
    pipe = MixOfShowXLPipeline(**base.components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    embeds = pipe.encode_prompt("a man", device="cpu")
    pipe.load_edlora(tuned[0] / "out")
    named = pipe.encode_prompt("a <potter>", device="cpu")
    assert named[0].shape[1] == 4 * embeds[0].shape[1]
    assert len({tuple(part.flatten().tolist()) for part in named[0].unflatten(1, (4, -1))[0]}) == 4
    assert not torch.allclose(named[2], embeds[2], atol=1e-4)
    pipe.unload_edlora()


def test_a_stock_pipeline_loads_it_as_a_lora_with_its_effect(base: Any, tuned: tuple[Path, EDLoRA]) -> None:
    stock = StableDiffusionXLPipeline(**base.components, add_watermarker=False)
    with merged(base.components, tuned[1]):
        expected = stock.encode_prompt("a man", device="cpu")
    before = stock.encode_prompt("a man", device="cpu")
    stock.load_lora_weights(tuned[0] / "out", weight_name="edlora.safetensors")
    found = stock.encode_prompt("a man", device="cpu")
    stock.unload_lora_weights()
    for place in (0, 2):
        torch.testing.assert_close(found[place], expected[place], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[place], before[place], atol=1e-3)


def test_its_statistics_lie_beside_it(tuned: tuple[Path, EDLoRA]) -> None:
    statistics = SourceStatistics.load(statistics_path(tuned[0] / "out" / "edlora.safetensors"))
    assert statistics.digest == tuned[1].digest
    assert set(statistics.concepts) == {"<potter>"}


@pytest.mark.parametrize("method", ["textual-inversion", "p-plus", "custom-diffusion"])
def test_where_layers_share_an_embedding_the_vector_shares_it_as_well(
    base: Any, tuned: tuple[Path, EDLoRA], method: str
) -> None:
    config = quick(tuned[0] / "photos", method=method, max_train_steps=1, train_batch_size=1)
    edlora = EDLoRATrainer(config, base).train()
    edlora.check_fits(base.components)
    for token in config.concept_to_learn.tokens:
        layers, vector = edlora.embeddings[f"text_encoder_2.{token}"], edlora.embeddings[f"pooled.{token}"]
        assert layers.shape == (4, 48)
        assert vector.shape == (1, 48)
        alike = method != "p-plus"
        assert bool((layers == vector).all()) is alike


def test_photos_in_half_precision_are_encoded_in_full(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoencoder like SDXL's overflows in float16; its weights are the same halves afterwards."""
    vae = tiny_pipeline("Stable Diffusion XL").vae.half()
    crops = [Crop(pixels=torch.full((3, 32, 32), 0.5), mask=torch.ones(1), valid=torch.ones(1))] * 3
    weights = {name: (value.data_ptr(), value.dtype) for name, value in vae.named_parameters()}
    seen: list[tuple[torch.dtype, int]] = []
    encode = vae.encode

    def noting(pixels: torch.Tensor) -> Any:
        seen.append((pixels.dtype, len(pixels)))
        return encode(pixels)

    monkeypatch.setattr(vae, "encode", noting)
    expected = LatentEncoder(tiny_pipeline("Stable Diffusion XL").vae.half().float()).encode(crops)
    torch.testing.assert_close(LatentEncoder(vae).encode(crops), expected)
    assert {name: (value.data_ptr(), value.dtype) for name, value in vae.named_parameters()} == weights
    vae.register_to_config(force_upcast=False)
    LatentEncoder(vae).encode(crops)
    monkeypatch.setattr("diffusers_mixofshow.training.latents._PIXELS_AT_ONCE", 2 * 32 * 32)
    LatentEncoder(vae).encode(crops)
    assert seen == [(torch.float32, 3), (torch.float16, 3), (torch.float16, 2), (torch.float16, 1)]


def test_latents_have_the_mean_and_deviation_that_the_autoencoder_names() -> None:
    """As diffusers' image to image makes them; of SDXL's children, Playground 2.5 has such an autoencoder."""
    vae = tiny_pipeline("Stable Diffusion XL").vae
    pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    crops = [Crop(pixels=pixels, mask=torch.ones(1), valid=torch.ones(1))]
    mean, deviation = LatentEncoder(vae).encode(crops)
    means, deviations = [-1.6, 1.2, 0.3, -2.0], [8.4, 5.9, 7.1, 4.6]
    vae.register_to_config(latents_mean=means, latents_std=deviations)
    found = LatentEncoder(vae).encode(crops)
    for channel in range(4):
        scale = vae.config.scaling_factor / deviations[channel]
        own = mean[:, channel] / vae.config.scaling_factor
        torch.testing.assert_close(found[0][:, channel], (own - means[channel]) * scale)
        torch.testing.assert_close(found[1][:, channel], deviation[:, channel] / deviations[channel])


def test_the_memory_that_lacks_is_saved_by_sizes_that_the_base_can_draw(base: Any) -> None:
    few = {"train_batch_size": 1, "gradient_checkpointing": True, "optimizer": "AdamW8bit", "mixed_precision": "bf16"}
    for resolution, name, components, told in [
        (1024, None, base.components, "resolution=768"),
        (1024, XL_ID, {}, "resolution=768"),
        (1024, "someone/unknown", {}, "resolution=512"),
        (768, None, base.components, "a GPU with more memory"),
        (512, None, {}, "a GPU with more memory"),
    ]:
        named = {} if name is None else {"pretrained_model_name_or_path": name}
        config = config_of(resolution=resolution, **named, **few)
        with pytest.raises(ConfigurationError, match=told), explain_memory_errors(config, lambda: components):  # noqa: B023
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_folder_is_loaded_as_sdxl_and_trained(
    base: Any, tuned: tuple[Path, EDLoRA], tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    base.save_pretrained(tmp_path)
    config = quick(
        tuned[0] / "photos", pretrained_model_name_or_path=str(tmp_path), mixed_precision=precision, max_train_steps=1
    )
    loaded = load_base(config)
    assert type(loaded) is StableDiffusionXLPipeline
    assert {part.dtype for part in loaded.components.values() if isinstance(part, nn.Module)} == {dtype}
    assert (loaded.watermark, loaded.config.force_zeros_for_empty_prompt) == (None, True)
    if precision != "no":  # which accelerate fixes for the whole process
        return
    edlora = EDLoRATrainer(config).train()
    assert all(rows.isfinite().all() and rows.dtype == torch.float32 for rows in edlora.embeddings.values())


def config_of(**settings: Any) -> TrainingConfig:
    return TrainingConfig.from_mapping(
        {"instance_data_dir": "photos", "concept": "potter", "class_word": "man", **settings}
    )


XL_ID = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.mark.parametrize(
    ("settings", "resolution"),
    [
        ({"pretrained_model_name_or_path": XL_ID}, 1024),
        ({"pretrained_model_name_or_path": XL_ID, "preset": "low-memory"}, 1024),
        ({"pretrained_model_name_or_path": XL_ID, "resolution": 768}, 768),
        ({"pretrained_model_name_or_path": "someone/unknown"}, 512),
        ({}, 512),
    ],
)
def test_the_size_is_the_bases_where_it_is_known(settings: dict[str, Any], resolution: int) -> None:
    assert config_of(**settings).resolution == resolution


def test_the_size_and_presets_of_a_folder_of_sdxl(base: Any, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path)
    on_it = {"pretrained_model_name_or_path": str(tmp_path)}
    for preset in PRESETS.keys() - {"toyland", "paper"}:
        config = config_of(**on_it, preset=preset)
        assert (config.resolution, config.as_record()["resolution"]) == (1024, 1024)
    with pytest.raises(ConfigurationError, match=r"preset is 'paper', which is about Stable Diffusion 1\.5"):
        config_of(**on_it, preset="paper")


@pytest.mark.parametrize(("resolution", "told"), [(8, True), (16, True), (24, False), (32, False), (64, False)])
def test_pictures_of_half_the_bases_size_are_told(
    base: Any, resolution: int, told: bool, recwarn: pytest.WarningsRecorder
) -> None:
    warn_of_small_pictures(base, config_of(resolution=resolution))
    assert [each.category for each in recwarn] == [MixOfShowWarning] * told
    if told:
        assert f"The base draws pictures of 32 pixels, but resolution is {resolution}" in str(recwarn[0].message)


NO_SECOND = ["it has no text_encoder_2", "it has no tokenizer_2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_encoder": None, "tokenizer": None}, ["it has no text_encoder", "it has no tokenizer"]),  # a refiner
        ({"text_encoder_2": None}, NO_SECOND[:1]),
        ({"tokenizer_2": None}, NO_SECOND[1:]),
        ({"scheduler": EDMEulerScheduler()}, ["its scheduler, EDMEulerScheduler, has no betas"]),
        ({"scheduler": None, "vae": None}, ["it has no vae", "it has no scheduler"]),
    ],
)
def test_a_pipeline_of_sdxl_that_cannot_be_tuned_is_refused(
    base: Any, change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        refuse_untrainable(SimpleNamespace(components={**base.components, **change}), config_of())  # type: ignore[arg-type]
    told = str(caught.value).removeprefix("This pipeline cannot be trained: ").split("; ")
    assert [each.removesuffix(" by which noise could be added") for each in told] == words


def test_half_precision_and_other_families_are_refused(base: Any, tmp_path: Path) -> None:
    half = tiny_pipeline("Stable Diffusion XL")
    half.text_encoder_2.half()
    with pytest.raises(ConfigurationError, match="text_encoder_2 are in half precision"):
        refuse_untrainable(half, config_of())
    refuse_untrainable(half, config_of(mixed_precision="fp16"))
    other = tiny_pipeline("FLUX.1")
    expected = r"is of FLUX\.1, whose concepts are not tuned; expected one of Stable Diffusion, Stable Diffusion XL"
    with pytest.raises(ConfigurationError, match=f"This pipeline cannot be trained: it {expected}"):
        refuse_untrainable(other, config_of())
    parts = {"transformer": ["diffusers", "FluxTransformer2DModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    index = {"_class_name": "FluxPipeline", **parts}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    config = config_of(pretrained_model_name_or_path=str(tmp_path))
    for work in (load_base, plan_training):
        with pytest.raises(ConfigurationError, match=f"^The base model .* cannot be trained: it {expected}"):
            work(config)
