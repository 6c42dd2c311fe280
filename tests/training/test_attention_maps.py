"""Attention maps are those of diffusers' own processor, recorded without replacing it, and the regulariser acts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_mixofshow.conditioning.attention import layerwise_attention
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.training import EDLoRATrainer, StepReport
from diffusers_mixofshow.training.attention_maps import AttentionRecord, record_attention
from diffusers_mixofshow.training.losses import attention_outside, attention_to_mask
from short_training import quick, same, tensors


def test_maps_are_diffusers_own_probabilities(pipeline: StableDiffusionPipeline) -> None:
    unet, generator = pipeline.unet, torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 7, 32, generator=generator)
    processors = dict(unet.attn_processors)
    path = cross_attention_layers(unet)[0]
    layer = unet.get_submodule(path)
    with record_attention(unet) as record, torch.no_grad():
        unet(latents, 10, encoder_hidden_states=text)
        maps = record.maps([3, 5], 16, 16)
        heads = [layer.head_to_batch_dim(part[path]) for part in (record.queries, record.keys)]
        expected = layer.get_attention_scores(*heads).unflatten(0, (2, -1)).mean(dim=1)  # (batch, places, tokens)
    assert set(maps) == {(8, 8)}
    record.queries, record.keys = {path: record.queries[path]}, {path: record.keys[path]}
    (alone,) = record.maps([3, 5], 16, 16).values()
    torch.testing.assert_close(alone.flatten(1), torch.stack([expected[0, :, 3], expected[1, :, 5]]))
    assert dict(unet.attn_processors) == processors
    assert not any(module._forward_hooks for module in unet.modules())


def test_maps_of_shared_texts_are_the_same_under_any_processor(pipeline: StableDiffusionPipeline) -> None:
    unet, generator = pipeline.unet, torch.Generator().manual_seed(0)
    latents, texts = torch.randn(3, 4, 16, 16, generator=generator), torch.randn(2, 7, 32, generator=generator)
    text_of = torch.tensor([0, 0, 1])

    def maps() -> torch.Tensor:
        with layerwise_attention(unet, tokens=7) as shared, record_attention(unet) as record, torch.no_grad():
            shared.text_of = text_of
            unet(latents, 10, encoder_hidden_states=texts)
            return record.maps([3, 5, 2], 16, 16, text_of)[8, 8]

    expected = maps()
    unet.set_attention_slice("max")
    torch.testing.assert_close(maps(), expected)


def test_both_forms_of_the_regulariser() -> None:
    subject = torch.zeros(2, 4, 4)
    subject[:, :2] = 1
    inside, everywhere = 0.3 * subject, torch.full((2, 4, 4), 0.3)
    torch.testing.assert_close(attention_outside(inside, subject), torch.zeros(2))
    torch.testing.assert_close(attention_outside(everywhere, subject), torch.ones(2))
    torch.testing.assert_close(attention_to_mask(inside, subject), torch.zeros(2))
    torch.testing.assert_close(attention_to_mask(everywhere, subject), torch.full((2,), 0.5))
    torch.testing.assert_close(attention_outside(everywhere, torch.ones(2, 4, 4)), torch.zeros(2))


@pytest.mark.parametrize("full", [False, True])
def test_the_regulariser_is_part_of_the_loss_and_changes_what_is_learnt(
    pipeline: StableDiffusionPipeline, photos: Path, full: bool
) -> None:
    reports: list[StepReport] = []
    both = {"captions_per_step": 2, "company": 0.0}  # the photo with a mask and the one without in each step
    config = quick(photos, **both, attn_reg_weight=0.5, reg_full_identity=full, gradient_checkpointing=full)
    edlora = EDLoRATrainer(config, pipeline, on_step=reports.append).train()
    assert all(report.parts["attention"] > 0 for report in reports)
    assert all(sum(report.parts.values()) == pytest.approx(report.loss) for report in reports)
    assert not same(edlora, EDLoRATrainer(quick(photos, **both), pipeline).train())


def test_photos_without_a_mask_are_not_regularised(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    (photos / "masks" / "0.png").unlink()
    reports: list[StepReport] = []
    config = quick(photos, attn_reg_weight=0.5, reg_full_identity=True)
    EDLoRATrainer(config, pipeline, on_step=reports.append).train()
    assert [report.parts["attention"] for report in reports] == [0.0] * 3


def test_recomputed_activations_change_nothing(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    ways = [
        EDLoRATrainer(quick(photos, gradient_checkpointing=recompute, attn_reg_weight=0.1), pipeline).train()
        for recompute in (False, True)
    ]
    usual, recomputed = map(tensors, ways)
    for name, value in usual.items():
        torch.testing.assert_close(value, recomputed[name], rtol=1e-4, atol=1e-5, msg=name)
    blocks = [*pipeline.unet.modules(), *pipeline.text_encoder.modules()]
    assert not any(getattr(block, "gradient_checkpointing", False) or block.training for block in blocks)


def test_full_identity_needs_the_regulariser(photos: Path) -> None:
    with pytest.raises(ConfigurationError, match="attn_reg_weight is 0"):
        quick(photos, reg_full_identity=True)


def test_maps_have_the_size_of_the_unets_levels() -> None:
    """Every halving rounds up, so that no map keeps the picture's exact shape."""
    record = AttentionRecord({"layer": SimpleNamespace(heads=1)})
    for size in ((36, 21), (18, 11), (9, 6), (5, 3), (3, 2), (2, 1), (1, 1)):
        record.queries["layer"], record.keys["layer"] = torch.randn(1, size[0] * size[1], 8), torch.randn(1, 77, 8)
        assert list(record.maps([1], 36, 21)) == [size]
