"""Which layers are adapted, how they are named, and in which order they stand."""

from __future__ import annotations

import pytest
import torch

import packs
import tiny
from diffusers_mixofshow.families.layers import (
    adapted_layers,
    canonical_name,
    components_with_sites,
    cross_attention_layers,
    linear_layers,
    self_attention_layers,
)
from diffusers_mixofshow.families.recognition import is_linear_site, unwrap_compiled
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION


BLOCKS = (
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
)
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = [
    f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{projection}"
    for layer in (0, 1)
    for projection in ("k_proj", "v_proj", "q_proj", "out_proj")
]
UNET = [
    f"unet.{block}.transformer_blocks.0.{attention}.{projection}"
    for block in BLOCKS
    for attention in ("attn1", "attn2")
    for projection in PROJECTIONS
]


@pytest.fixture(scope="module")
def components() -> dict[str, object]:
    return tiny.components()


@pytest.mark.parametrize("nested", [False, True])
def test_attention_layers_of_text_encoder_and_unet_down_mid_up(components: dict[str, object], nested: bool) -> None:
    given = packs.with_nested_text_encoder(components) if nested else components
    found = adapted_layers(dict(reversed(given.items())))
    assert sorted(list(found)[:8]) == sorted(TEXT)
    assert list(found)[8:] == UNET
    assert all(isinstance(layer, torch.nn.Linear) for layer in found.values())
    encoder = given["text_encoder"]
    inner = getattr(encoder, "text_model", encoder)  # transformers before 5.6 has it in any case
    assert found[TEXT[6]] is inner.get_submodule("encoder.layers.1.self_attn.q_proj")
    assert found[UNET[0]] is given["unet"].get_submodule(UNET[0].removeprefix("unet."))


def test_components_that_are_absent_or_no_models_are_left_out(components: dict[str, object]) -> None:
    unet, text_encoder = components["unet"], components["text_encoder"]
    assert list(components_with_sites({"unet": unet, "vae": components["vae"], "text_encoder": text_encoder})) == [
        "text_encoder",
        "unet",
    ]
    assert list(components_with_sites({"unet": unet, "text_encoder_2": text_encoder, "text_encoder": None})) == [
        "text_encoder_2",
        "unet",
    ]
    assert list(adapted_layers({"unet": unet})) == UNET
    assert adapted_layers({"vae": components["vae"]}) == {}


def test_other_loras_may_adapt_feed_forward_layers_and_projections_as_well(components: dict[str, object]) -> None:
    block = "unet.mid_block.attentions.0"
    others = {site for site in linear_layers(components) if site not in adapted_layers(components)}
    assert {site for site in others if site.startswith(block)} == {
        f"{block}.{path}"
        for path in ("proj_in", "proj_out", "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2")
    }
    assert {site for site in others if site.startswith("text_encoder")} == {
        f"text_encoder.text_model.encoder.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in ("fc1", "fc2")
    }
    assert {site for site in others if site.startswith("unet.up_blocks.1.resnets.0")} == {
        f"unet.up_blocks.1.resnets.0.{name}" for name in ("time_emb_proj", "conv_shortcut")
    }
    order = [site.split(".")[1] for site in linear_layers(components) if site.startswith("unet")]
    assert order == sorted(order, key=("down_blocks", "mid_block", "up_blocks").index)


def test_attention_layers_of_a_denoiser(components: dict[str, object]) -> None:
    unet = components["unet"]
    assert cross_attention_layers(unet) == tuple(f"{block}.transformer_blocks.0.attn2" for block in BLOCKS)
    assert self_attention_layers(unet) == tuple(f"{block}.transformer_blocks.0.attn1" for block in BLOCKS)
    assert cross_attention_layers(tiny.controlnet(unet)) == cross_attention_layers(unet)[:2]


def test_a_compiled_model_is_the_model_inside(components: dict[str, object]) -> None:
    unet = components["unet"]
    wrapped = torch.compile(unet)
    assert unwrap_compiled(wrapped) is unet is unwrap_compiled(unet)
    assert components_with_sites({"unet": wrapped}) == {"unet": unet}
    assert cross_attention_layers(wrapped) == cross_attention_layers(unet)


@pytest.mark.parametrize(
    ("site", "reads", "linear"),
    [
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", True, True),
        ("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v", True, True),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q", False, True),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", False, True),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k", False, True),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A", False, False),
        ("unet.other_blocks.0.attn2.to_k", True, False),
        ("vae.mid_block.attentions.0.attn2.to_k", False, False),
        ("unet.mid_block.attentions.0.proj_in", False, True),
        ("unet.conv_in", False, False),
        ("text_encoder.text_model.encoder.layers.11.self_attn.q_proj", False, True),
        ("text_encoder.encoder.layers.11.self_attn.out_proj", False, True),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc2", False, True),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc3", False, False),
        ("text_encoder.text_model.embeddings.position_embedding", False, False),
    ],
)
def test_names_of_sites(site: str, reads: bool, linear: bool) -> None:
    assert (STABLE_DIFFUSION.reads_text(site), is_linear_site(site)) == (reads, linear)


def test_text_sites_carry_one_name_under_every_transformers() -> None:
    for component in ("text_encoder", "text_encoder_2"):
        for path in ("encoder.layers.0", "text_model.encoder.layers.0"):
            assert canonical_name(component, path) == f"{component}.text_model.encoder.layers.0"
    assert canonical_name("unet", "mid_block") == "unet.mid_block"
