"""Which family of models a file is for, told from its layers and widths alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from diffusers_mixofshow import toyland
from diffusers_mixofshow.base_models import known_family
from diffusers_mixofshow.cli.diagnosis import check_base_model
from diffusers_mixofshow.edlora.low_rank import LowRank, input_widths
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families.clip import CLIP_G, CLIP_L
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.families.recognition import (
    BASE_MODELS,
    FAMILIES,
    family_of_index,
    foreign_layers,
    layers_of,
    recognise,
    transformers_with,
)
from diffusers_mixofshow.families.sdxl import EMBEDDED_XL, SDXL
from diffusers_mixofshow.families.stable_diffusion import EMBEDDED, SD1, SD2
from diffusers_mixofshow.interop.foreign import read_foreign
from diffusers_mixofshow.interop.summary import summary_of_foreign
from diffusers_mixofshow.sampling.loading import load_base


def lora(*sites: str, width: int = 8) -> dict[str, LowRank]:
    return {site: LowRank(down=torch.ones(1, width), up=torch.ones(4, 1), alpha=1.0) for site in sites}


BLOCK = "attentions.0.transformer_blocks.0"
KEY, TEXT = f"unet.mid_block.{BLOCK}.attn2.to_k", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
OF_XL = f"unet.down_blocks.2.{BLOCK[:-1]}9.attn1.to_q"


@pytest.mark.parametrize(
    ("updates", "vectors", "expected"),
    [
        (lora(KEY, width=768), [], SD1),
        (lora(KEY.replace("to_k", "to_v"), width=1024), [], SD2),
        (lora(KEY, width=2048), [], SDXL),
        (lora(KEY, width=128), [], EMBEDDED),
        (lora(f"unet.down_blocks.0.{BLOCK}.attn2.to_k", width=128), [], None),  # as wide as Toyland, other layers
        (lora(KEY, width=640), [], None),
        (lora(KEY, width=768) | lora(KEY.replace("to_k", "to_v"), width=1024), [], None),
        (lora("text_encoder_2.x.self_attn.q_proj", width=768), [], SDXL),
        ({}, [{CLIP_L: 768}, {CLIP_L: 768, CLIP_G: 1280}], SDXL),
        ({}, [{CLIP_L: 32}, {CLIP_L: 32, CLIP_G: 128}], EMBEDDED_XL),
        (lora("text_encoder_2.x.self_attn.q_proj", width=128), [], EMBEDDED_XL),
        (lora("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k", width=160), [], EMBEDDED_XL),
        (lora("unet.down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k", width=160), [], None),
        (lora(KEY, width=768), [{CLIP_G: 1280}], SD1),  # what cross-attention reads comes first
        (lora(f"unet.mid_block.{BLOCK}.attn1.to_q"), [], SD1),
        (lora(f"unet.mid_block.{BLOCK}.attn2.to_q"), [], SD1),  # which reads the picture, not the text
        (lora(OF_XL), [], SDXL),
        (lora("unet.up_blocks.9.attentions.0.transformer_blocks.0.attn1.to_q"), [], None),
        (lora(TEXT, width=768), [], SD1),
        (lora(TEXT, width=1024), [], SD2),
        (lora(TEXT, width=128), [], EMBEDDED),
        (lora(TEXT.replace("q_proj", "out_proj"), width=768), [], None),
        (lora(TEXT, width=768), [{CLIP_L: 1024}], None),
        ({}, [{CLIP_L: 768}], SD1),
        ({}, [{CLIP_L: 1024}], SD2),
        ({}, [{CLIP_L: 5}], None),
        ({}, [], None),
    ],
)
def test_families_are_known_by_widths_and_layers(updates, vectors, expected) -> None:
    assert recognise(input_widths(updates), vectors) is expected


def test_the_layers_of_the_families_are_those_of_their_models() -> None:
    settings = [
        (SD1, {"cross_attention_dim": 768, "attention_head_dim": 8}),
        (SDXL, {
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
        }),
    ]  # fmt: skip
    for family, given in settings:
        with torch.device("meta"):
            assert cross_attention_layers(UNet2DConditionModel(**given)) == family.layers
    assert EMBEDDED.layers == cross_attention_layers(toyland.load_pipeline().unet)
    assert SD2.layers == SD1.layers
    assert [one for one in BASE_MODELS if one.has_two_text_encoders] == [SDXL, EMBEDDED_XL]
    assert [(one.kohya, one.id) for one in (SD1, SD2, EMBEDDED, SDXL)] == [
        ("sd_v1", "stable-diffusion-v1-5/stable-diffusion-v1-5"), ("sd_v2", ""), ("toyland", "toyland"),
        ("sdxl_base_v1-0", ""),
    ]  # fmt: skip


def test_layers_of_an_unknown_family_are_those_that_it_names_in_the_models_order() -> None:
    order = ["down_blocks.2", "down_blocks.10", "mid_block", "up_blocks.1"]
    sites = [f"unet.{block}.{BLOCK}.attn{number}.to_k" for block in reversed(order) for number in (1, 2)]
    sites.append("unet.up_blocks.1.attentions.0.transformer_blocks.10.attn1.to_q")
    sites.append("unet.up_blocks.1.attentions.0.transformer_blocks.9.attn1.to_q")
    named = tuple(f"{block}.{BLOCK}.attn2" for block in order)
    named += tuple(f"up_blocks.1.attentions.0.transformer_blocks.{number}.attn2" for number in (9, 10))
    assert layers_of(input_widths(lora(*sites, width=7)), 7) == named
    assert layers_of(input_widths(lora(*sites, width=7)), 7, 6) == named
    assert layers_of(input_widths(lora(*sites, width=7)), 7, 5) == ()
    assert layers_of({}, None) == layers_of({}, 7) == ()
    assert layers_of({}, 768) == layers_of({}, 768, 16) == SD1.layers
    assert layers_of({}, 768, 15) == ()
    assert layers_of(input_widths(lora(KEY, width=2048)), None) == SDXL.layers


def test_layers_that_a_family_has_not_are_named() -> None:
    strange = f"unet.up_blocks.0.{BLOCK}.attn1.to_q"
    assert foreign_layers(lora(KEY, strange, TEXT, "unet.conv_in"), SD1) == [strange]


@pytest.mark.parametrize(
    ("width", "block", "problem"),
    [
        (768, "mid_block", ""),
        (640, "mid_block", "its layers and widths match no known base model"),
        (768, "up_blocks.0", "layers that Stable Diffusion 1.x does not have: "),
    ],
)
def test_a_summary_tells_what_fits_no_family(tmp_path: Path, width: int, block: str, problem: str) -> None:
    halves = {"lora_A": torch.ones(2, width), "lora_B": torch.ones(8, 2)}
    save_file(
        {f"unet.{block}.{BLOCK}.attn2.to_k.{half}.weight": value for half, value in halves.items()},
        tmp_path / "x.safetensors",
    )
    problems = summary_of_foreign(read_foreign(tmp_path / "x.safetensors"))["problems"]
    assert [one[: len(problem)] for one in problems] == [problem] * bool(problem)


DOUBLE = "transformer.transformer_blocks.0.attn"


@pytest.mark.parametrize(
    ("site", "width", "families"),
    [
        (f"{DOUBLE}.to_q", 1536, ["Stable Diffusion 3"]),
        (f"{DOUBLE}.add_k_proj", 2432, ["Stable Diffusion 3"]),
        (f"{DOUBLE}.to_q", 4096, ["FLUX.2 klein"]),
        (f"{DOUBLE}.to_q", 3072, ["FLUX.1", "FLUX.2 klein", "Qwen-Image"]),
        (f"{DOUBLE}.to_q", 6144, ["Krea 2"]),
        (f"{DOUBLE}.to_q", 32, ["FLUX.1", "FLUX.2 klein", "Stable Diffusion 3", "Qwen-Image", "Krea 2"]),
        (f"{DOUBLE}.to_out.0", 1536, ["FLUX.1", "FLUX.2 klein", "Stable Diffusion 3", "Qwen-Image", "Krea 2"]),
        (f"{DOUBLE[:-4]}attn2.to_q", 1536, ["Stable Diffusion 3"]),
        (f"{DOUBLE[:-4]}attn2.to_q", 2048, ["Anima"]),
        (f"{DOUBLE[:-4]}attn2.to_k", 1024, ["Anima"]),
        (f"{DOUBLE[:-4]}attn2.to_k", 32, ["Stable Diffusion 3", "Anima"]),
        ("transformer.single_transformer_blocks.0.attn.to_q", 1536, ["FLUX.1"]),
        ("transformer.layers.0.attention.to_q", 3072, ["Z-Image"]),
        ("transformer.transformer_blocks.0.attn.to_gate", 8, ["Krea 2"]),
        (KEY, 768, []),
        (TEXT, 768, []),
    ],
)
def test_transformers_are_known_by_names_and_where_these_are_alike_by_widths(site, width, families) -> None:
    widths = input_widths(lora(site, width=width))
    assert [family.name for family in transformers_with(widths)] == families
    model = recognise(widths)
    if len(families) == 1:
        assert model in next(one for one in FAMILIES if one.name == families[0]).models
    elif families:
        assert model is None


def test_a_base_models_name_tells_which_transformer_is_meant() -> None:
    widths = input_widths(lora(f"{DOUBLE}.to_q", width=32))
    assert [one.name for one in transformers_with(widths, "Qwen/Qwen-Image")] == ["Qwen-Image"]
    assert len(transformers_with(widths, "somebody/else")) == 5


FOREIGN = {
    "PixArtSigmaPipeline": {"text_encoder": "T5EncoderModel", "transformer": "PixArtTransformer2DModel"},
    "KandinskyV22Pipeline": {"unet": "UNet2DConditionModel", "movq": "VQModel"},
    "IFPipeline": {"text_encoder": "T5EncoderModel", "unet": "UNet2DConditionModel"},
    "KolorsPipeline": {"text_encoder": "ChatGLMModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"},
    "AudioLDMPipeline": {"text_encoder": "ClapTextModelWithProjection", "unet": "UNet2DConditionModel"},
    "Lumina2Pipeline": {"text_encoder": "Gemma2Model", "transformer": "Lumina2Transformer2DModel"},
    "StableVideoDiffusionPipeline": {"unet": "UNetSpatioTemporalConditionModel"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_pipeline_of_no_known_family_is_of_none_and_is_named_where_it_is_met(name, tmp_path, monkeypatch) -> None:
    index = {"_class_name": name, **{part: ["library", kind] for part, kind in FOREIGN[name].items()}}
    (tmp_path / name).mkdir()
    (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    monkeypatch.chdir(tmp_path)
    assert family_of_index(index) is None
    assert known_family(name) is None
    finding = check_base_model(name)
    assert (finding.state, finding.found) == ("problem", f"{name}: a {name}, of no family that is known here")
    with pytest.raises(ConfigurationError, match=f"is a {name}, which is of no family that is known here"):
        load_base(str(tmp_path / name), "cpu")
