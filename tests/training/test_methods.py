"""The baselines learn what they should and nothing else, behind the same trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families.layers import adapted_layers
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_mixofshow.lora import merged
from diffusers_mixofshow.training import EDLoRATrainer, StepReport
from diffusers_mixofshow.training.methods import METHODS
from short_training import quick, same


reads_text = STABLE_DIFFUSION.reads_text


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_learns_its_parts(
    name: str, pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    method = METHODS[name]
    rates: list[set[str]] = []

    def note(report: StepReport) -> None:
        rates.append(set(report.learning_rates))

    config = quick(photos, method=name, max_train_steps=2, output_dir=tmp_path / "out")
    edlora = EDLoRATrainer(config, pipeline, on_step=note).train()
    edlora.check_fits(pipeline.components)
    assert same(EDLoRA.from_pretrained(tmp_path / "out"), edlora)
    assert len(edlora.embeddings) == method.tokens
    first = edlora.embeddings["<potter1>"]
    assert first.shape[0] == len(edlora.layers)
    assert (first[0] == first[1]).all().item() is not method.layerwise
    changed = {site for site, update in edlora.lora.items() if low_rank_delta(update).any()}
    expected = {
        "attention": set(adapted_layers(pipeline.components)),
        "text keys and values": {site for site in adapted_layers(pipeline.components) if reads_text(site)},
        "nothing": set(),
    }
    assert set(edlora.lora) == changed == expected[method.adapts]
    assert rates[0] == {"embeddings"}
    assert ("unet_text_kv" in rates[-1]) is (method.adapts != "nothing")


def test_class_token_of_custom_diffusion_stays_the_word(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    edlora = EDLoRATrainer(quick(photos, method="custom-diffusion"), pipeline).train()
    ids = pipeline.tokenizer("man", add_special_tokens=False).input_ids
    word = pipeline.text_encoder.get_input_embeddings().weight[ids].mean(dim=0)
    assert torch.equal(edlora.embeddings["<potter2>"], word.expand(len(edlora.layers), -1))


def test_matrices_of_custom_diffusion_are_whole_and_mergeable(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    edlora = EDLoRATrainer(quick(photos, method="custom-diffusion"), pipeline).train()
    site, update = next(iter(edlora.lora.items()))
    layer = adapted_layers(pipeline.components)[site]
    assert update.rank == min(layer.weight.shape)
    before = layer.weight.clone()
    with merged(pipeline.components, edlora):
        torch.testing.assert_close(layer.weight - before, low_rank_delta(update), atol=1e-6, rtol=1e-4)


def test_embeddings_alone_need_a_rate(photos: Path) -> None:
    with pytest.raises(ConfigurationError, match="learns embeddings alone"):
        quick(photos, method="p-plus", embedding_learning_rate=0.0, embedding_phase_steps=0)
    with pytest.raises(ConfigurationError, match="method is 'dreambooth', expected one of ed-lora"):
        quick(photos, method="dreambooth")
