"""Streaming statistics against a batch, and which layers share an input."""

import pytest
import torch

import tiny
from diffusers_mixofshow.families.layers import adapted_layers
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_mixofshow.fusion.gram import sum_grams
from diffusers_mixofshow.fusion.statistics import ConceptStatistics


def test_streaming_equals_batch() -> None:
    features = torch.randn(6, 5, 8)
    stream = ConceptStatistics()
    for part in features.split(2):
        stream.add("layer", part)
    rows = features.double().flatten(end_dim=-2)
    torch.testing.assert_close(stream.gram("layer").matrix(), rows.T @ rows / 30)
    assert stream.tokens("layer") == 30
    assert stream.tokens("other") == 0
    assert stream.inputs == ("layer",)


def test_half_precision_features_are_summed_in_full() -> None:
    features = torch.randn(5000, 4).half()
    statistics = ConceptStatistics()
    statistics.add("layer", features)
    torch.testing.assert_close(statistics.gram("layer").matrix(), features.double().T @ features.double() / 5000)


def test_autocast_does_not_reach_the_products() -> None:
    features = torch.randn(50, 4)
    statistics = ConceptStatistics()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        statistics.add("layer", features)
    torch.testing.assert_close(statistics.gram("layer").matrix(), features.double().T @ features.double() / 50)


def test_parts_are_those_that_were_recorded() -> None:
    statistics = ConceptStatistics()
    assert statistics.parts == ()
    statistics.add("layer", torch.randn(5, 4), "held_out")
    assert statistics.parts == ("held_out",)
    statistics.add("layer", torch.randn(5, 4))
    assert statistics.parts == ("fit", "held_out")


def test_concepts_weigh_the_same_however_long_they_were_recorded() -> None:
    short, long = ConceptStatistics(), ConceptStatistics()
    features = torch.randn(10, 4)
    short.add("layer", features)
    for _ in range(7):
        long.add("layer", features)
    torch.testing.assert_close(short.gram("layer").matrix(), long.gram("layer").matrix())
    both = sum_grams((one.gram("layer"), 1.0) for one in (short, long))
    torch.testing.assert_close(both.matrix(), 2 * short.gram("layer").matrix())


@pytest.mark.parametrize(
    ("site", "name"),
    [
        ("unet.mid_block.attn1.to_k", "unet.mid_block.attn1.to_q+to_k+to_v"),
        ("unet.mid_block.attn2.to_v", "unet.mid_block.attn2.to_k+to_v"),
        ("unet.mid_block.attn2.to_q", "unet.mid_block.attn2.to_q"),
        ("unet.mid_block.attn2.to_out.0", "unet.mid_block.attn2.to_out.0"),
        ("text_encoder.layers.0.self_attn.v_proj", "text_encoder.layers.0.self_attn.q_proj+k_proj+v_proj"),
        ("text_encoder.layers.0.self_attn.out_proj", "text_encoder.layers.0.self_attn.out_proj"),
    ],
)
def test_names_of_inputs(site: str, name: str) -> None:
    assert STABLE_DIFFUSION.input_of(site) == name


def test_each_attention_reads_two_inputs_or_three() -> None:
    names = {STABLE_DIFFUSION.input_of(site) for site in adapted_layers(tiny.components())}
    assert len(names) == 2 * 2 + 4 * (2 + 3)  # 2 text layers, 4 transformer blocks of two attentions
