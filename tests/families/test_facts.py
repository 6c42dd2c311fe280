"""What is written down of each family and its published models, held against a second writing."""

from __future__ import annotations

import pytest

from diffusers_mixofshow.families import FAMILIES, Family
from diffusers_mixofshow.families.recognition import BASE_MODELS, COMPONENTS


BY_NAME = {family.name: family for family in FAMILIES}

# Published model: its family, its names in metadata and on the Hub, its licence, its guidance, and its sizes; the last
# is the side of the smallest training pictures.
MODELS = {
    "Stable Diffusion 1.x": (
        "Stable Diffusion", "sd_v1",
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5",
         "CompVis/stable-diffusion-v1-4"),
        "creativeml-openrail-m", 7.5, 768, {"clip_l": 768}, 16, 512,
    ),
    "Stable Diffusion 2.x": ("Stable Diffusion", "sd_v2", ("",), "", 7.5, 1024, {"clip_l": 1024}, 16, 512),
    "Toyland, the base in diffusers-mixofshow": (
        "Stable Diffusion", "toyland", ("toyland",), "apache-2.0", 3.0, 128, {"clip_l": 128}, 7, 64,
    ),
    "Stable Diffusion XL": (
        "Stable Diffusion XL", "sdxl_base_v1-0", ("", "stabilityai/stable-diffusion-xl-base-1.0"), "openrail++", 5.0,
        2048, {"clip_l": 768, "clip_g": 1280}, 70, 768,
    ),
    "Toyland's Stable Diffusion XL, a base in diffusers-mixofshow-bases": (
        "Stable Diffusion XL", "toyland-xl", ("toyland-xl",), "apache-2.0", 3.0,
        160, {"clip_l": 32, "clip_g": 128}, 10, 96,
    ),
    "FLUX.1": ("FLUX.1", "flux1", ("black-forest-labs/FLUX.1-dev",), "", 3.5, 0, {}, 0, 512),
    "FLUX.2 klein": ("FLUX.2 klein", "flux2", ("black-forest-labs/FLUX.2-klein-4B",), "", 1.0, 0, {}, 0, 512),
    "Stable Diffusion 3.5": (
        "Stable Diffusion 3", "sd3", ("stabilityai/stable-diffusion-3.5-medium",), "", 7.0, 0, {}, 0, 512,
    ),
    "Toyland's transformer, a base in diffusers-mixofshow-bases": (
        "Stable Diffusion 3", "toyland-sd3", ("toyland-sd3",), "apache-2.0", 3.0, 0, {}, 0, 64,
    ),
    "Qwen-Image": ("Qwen-Image", "qwen_image", ("Qwen/Qwen-Image",), "", 4.0, 0, {}, 0, 512),
    "Z-Image": ("Z-Image", "zimage", ("Tongyi-MAI/Z-Image-Turbo",), "", 0.0, 0, {}, 0, 512),
    "Krea 2": ("Krea 2", "krea2", ("",), "", 4.5, 0, {}, 0, 512),
    "Anima": ("Anima", "anima", ("",), "", 4.0, 1024, {}, 0, 512),
}  # fmt: skip


def test_published_models() -> None:
    written = {
        model.name: (
            family.name, model.kohya, (model.id, *model.other_ids), model.license, model.guidance,
            model.text_width, dict(model.embeddings), len(model.layers), model.least_resolution,
        )
        for family in FAMILIES
        for model in family.models
    }  # fmt: skip
    assert written == MODELS
    assert [model.name for model in BASE_MODELS] == list(MODELS)


UNET = ("unet", "UNet2DConditionModel", "DPMSolverMultistepScheduler", "guidance_scale", 1.0, True, "attn2", "attn1")
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
ONE_ENCODER = {"text_encoder": "tokenizer"}


def transformer(kind: str, argument: str = "guidance_scale", off: float = 1.0, negative: bool = True) -> tuple:
    return ("transformer", f"{kind}Transformer2DModel", "", argument, off, negative, "", "")


CALLS = {
    "Stable Diffusion": ("StableDiffusionPipeline", ONE_ENCODER, UNET),
    "Stable Diffusion XL": ("StableDiffusionXLPipeline", ENCODERS, UNET),
    "FLUX.1": ("FluxPipeline", ONE_ENCODER, transformer("Flux", negative=False)),
    "FLUX.2 klein": ("Flux2KleinPipeline", {}, transformer("Flux2", negative=False)),
    "Stable Diffusion 3": ("StableDiffusion3Pipeline", ENCODERS, transformer("SD3")),
    "Qwen-Image": ("QwenImagePipeline", {}, transformer("QwenImage", "true_cfg_scale")),
    "Z-Image": ("ZImagePipeline", {}, transformer("ZImage", off=0.0)),
    "Krea 2": ("Krea2Pipeline", {}, transformer("Krea2", off=0.0)),
    "Anima": ("", {}, ("transformer", "CosmosTransformer3DModel", "", "guidance_scale", 1.0, True, "", "")),
}


def test_the_families_parts_and_calls() -> None:
    written = {
        family.name: (
            family.pipeline,
            {name: encoder.tokenizer for name, encoder in family.text_encoders.items()},
            (
                family.denoiser, family.denoiser_class, family.sampler, family.guidance_argument, family.guidance_off,
                family.takes_negative_prompt, family.cross_attention, family.self_attention,
            ),
        )
        for family in FAMILIES
    }  # fmt: skip
    assert written == CALLS
    assert list(written) == list(CALLS)  # of two that fit alike, the first is meant
    assert COMPONENTS == ("text_encoder", "text_encoder_2", "transformer", "unet")
    for name, family in BY_NAME.items():
        _, tokenizers, (denoiser, *_) = CALLS[name]
        assert family.components == (*tokenizers, denoiser)
        assert set(family.parts) == {denoiser, *tokenizers, *tokenizers.values(), "vae", "scheduler"}


CLIP = "text_encoder.text_model.encoder.layers.0"
QKV = "to_q+to_k+to_v"
ADDED = "add_q_proj+add_k_proj+add_v_proj"
OF_UNETS = [
    (f"{CLIP}.self_attn.q_proj", "text encoder", "text", True, f"{CLIP}.self_attn.q_proj+k_proj+v_proj"),
    (f"{CLIP}.self_attn.out_proj", "text encoder", "text", True, ""),
    (f"{CLIP}.mlp.fc1", "text encoder", "text", False, ""),
    (
        "unet.mid_block.0.attn2.to_v", "keys and values of the text", "cross k v", True,
        "unet.mid_block.0.attn2.to_k+to_v",
    ),
    ("unet.mid_block.0.attn2.to_q", "other layers", "cross q out", True, ""),
    ("unet.mid_block.0.attn2.to_out.0", "other layers", "cross q out", True, ""),
    ("unet.mid_block.0.attn1.to_k", "other layers", "self", True, f"unet.mid_block.0.attn1.{QKV}"),
    ("unet.mid_block.0.attn1.to_out.0", "other layers", "self", True, ""),
    ("unet.mid_block.0.ff.net.0.proj", "other layers", "other", False, ""),
    ("unet.mid_block.0.ff.net.2", "other layers", "other", False, ""),
    ("unet.mid_block.0.proj_in", "other layers", "other", False, ""),
    ("unet.mid_block.0.proj_out", "other layers", "other", False, ""),
    ("unet.mid_block.0.time_emb_proj", "other layers", "other", False, ""),
    ("unet.up_blocks.0.conv_shortcut", "other layers", "other", False, ""),
]  # fmt: skip


def of_double_blocks(of_ff: str = "ff", of_text_ff: str = "ff_context") -> list[tuple]:
    block = "transformer.transformer_blocks.1"
    return [
        (f"{block}.attn.to_k", "transformer", "attention", True, f"{block}.attn.{QKV}"),
        (f"{block}.attn.to_out.0", "transformer", "attention", True, ""),
        (f"{block}.attn.add_v_proj", "transformer", "attention", True, f"{block}.attn.{ADDED}"),
        (f"{block}.attn.to_add_out", "transformer", "attention", True, ""),
        (f"{block}.{of_ff}", "transformer", "feed forward", False, ""),
        (f"{block}.{of_text_ff}", "transformer", "feed forward", False, ""),
    ]


def of_clip(*encoders: str) -> list[tuple]:
    rows = []
    for encoder in encoders:
        layer = f"{encoder}.text_model.encoder.layers.11"
        rows += [
            (f"{layer}.self_attn.v_proj", "text", "text encoder", True, f"{layer}.self_attn.q_proj+k_proj+v_proj"),
            (f"{layer}.mlp.fc2", "text", "text encoder", False, ""),
        ]
    return rows


SINGLE = "transformer.single_transformer_blocks.37"
# Site, stage, group, whether an ED-LoRA adapts it, name of its input where it is not its own.
SITES = {
    "Stable Diffusion": OF_UNETS,
    "Stable Diffusion XL": [*OF_UNETS, (f"text_encoder_2{CLIP.removeprefix('text_encoder')}.mlp.fc2", "text encoder",
                                        "text", False, "")],
    "FLUX.1": [
        *of_clip("text_encoder"),
        *of_double_blocks("ff.net.0.proj", "ff_context.net.2"),
        *[(f"transformer.transformer_blocks.1.{norm}.linear", "transformer", "modulation", False,
           "transformer.modulation") for norm in ("norm1", "norm1_context")],
        (f"{SINGLE}.norm.linear", "transformer", "modulation", False, "transformer.modulation"),
        (f"{SINGLE}.attn.to_v", "transformer", "attention", True, f"{SINGLE}.attn.to_q+attn.to_k+attn.to_v+proj_mlp"),
        (f"{SINGLE}.proj_mlp", "transformer", "feed forward", False,
         f"{SINGLE}.attn.to_q+attn.to_k+attn.to_v+proj_mlp"),
        (f"{SINGLE}.proj_out", "transformer", "feed forward", False, ""),
    ],
    "FLUX.2 klein": [
        *of_double_blocks("ff.linear_in", "ff_context.linear_out"),
        (f"{SINGLE}.attn.to_qkv_mlp_proj", "transformer", "attention", True, ""),
        (f"{SINGLE}.attn.to_out", "transformer", "attention", True, ""),
        *[(f"transformer.{stream}.linear", "transformer", "modulation", False, "transformer.modulation") for stream in
          ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")],
    ],
    "Stable Diffusion 3": [
        *of_clip("text_encoder", "text_encoder_2"),
        *of_double_blocks("ff.net.2", "ff_context.net.0.proj"),
        ("transformer.transformer_blocks.1.attn2.to_q", "transformer", "attention", True,
         f"transformer.transformer_blocks.1.attn2.{QKV}"),
        ("transformer.transformer_blocks.1.norm1.linear", "transformer", "modulation", False,
         "transformer.modulation"),
        ("transformer.transformer_blocks.1.norm1_context.linear", "transformer", "modulation", False,
         "transformer.modulation"),
    ],
    "Qwen-Image": [
        *of_double_blocks("img_mlp.net.0.proj", "txt_mlp.net.2"),
        ("transformer.transformer_blocks.1.img_mod.1", "transformer", "modulation", False, "transformer.modulation"),
        ("transformer.transformer_blocks.1.txt_mod.1", "transformer", "modulation", False, "transformer.modulation"),
    ],
    "Z-Image": [
        *[(f"transformer.{block}.3.attention.to_q", stage, "attention", True,
           f"transformer.{block}.3.attention.{QKV}")
          for block, stage in (("noise_refiner", "transformer"), ("context_refiner", "text"),
                               ("layers", "transformer"))],
        ("transformer.layers.3.attention.to_out.0", "transformer", "attention", True, ""),
        ("transformer.layers.3.feed_forward.w3", "transformer", "feed forward", False,
         "transformer.layers.3.feed_forward.w1+w3"),
        ("transformer.layers.3.feed_forward.w2", "transformer", "feed forward", False, ""),
        ("transformer.layers.3.adaLN_modulation.0", "transformer", "modulation", False, "transformer.modulation"),
        ("transformer.noise_refiner.0.adaLN_modulation.0", "transformer", "modulation", False,
         "transformer.modulation"),
    ],
    "Krea 2": [
        *[(f"transformer.{block}.3.attn.to_gate", stage, group, True,
           f"transformer.{block}.3.attn.{QKV}+to_gate")
          for block, stage, group in (("transformer_blocks", "transformer", "attention"),
                                      ("text_fusion.layerwise_blocks", "text", "text fusion"),
                                      ("text_fusion.refiner_blocks", "text", "text fusion"))],
        ("transformer.transformer_blocks.3.attn.to_out.0", "transformer", "attention", True, ""),
        ("transformer.transformer_blocks.3.ff.up", "transformer", "feed forward", False,
         "transformer.transformer_blocks.3.ff.gate+up"),
        ("transformer.transformer_blocks.3.ff.down", "transformer", "feed forward", False, ""),
    ],
    "Anima": [
        ("transformer.transformer_blocks.3.attn2.to_v", "text", "cross k v", True, "transformer.text"),
        ("transformer.transformer_blocks.3.attn2.to_q", "transformer", "attention", True, ""),
        ("transformer.transformer_blocks.3.attn1.to_k", "transformer", "attention", True,
         f"transformer.transformer_blocks.3.attn1.{QKV}"),
        ("transformer.transformer_blocks.3.attn1.to_out.0", "transformer", "attention", True, ""),
        ("transformer.transformer_blocks.3.norm2.linear_1", "transformer", "modulation", False,
         "transformer.modulation"),
        ("transformer.transformer_blocks.3.norm2.linear_2", "transformer", "modulation", False, ""),
        ("transformer.transformer_blocks.3.ff.net.0.proj", "transformer", "feed forward", False, ""),
        ("transformer.transformer_blocks.3.ff.net.2", "transformer", "feed forward", False, ""),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SITES)
def test_what_each_layer_is(name: str) -> None:
    family: Family = BY_NAME[name]
    for site, stage, group, adapted, shared in SITES[name]:
        component, _, path = site.partition(".")
        part = family.text_encoders.get(component, family)
        found = (family.stage_of(site).name, family.group_of(site), part.adapted.fullmatch(path) is not None)
        assert (family.has_site(site), *found) == (True, stage, group, adapted), site
        assert family.input_of(site) == (shared or site)
        assert family.stage_of(site).text_alone is (stage not in ("transformer", "other layers"))
        assert family.reads_text(site) is (stage == "keys and values of the text" or
                                           (stage == "text" and component == "transformer"))  # fmt: skip
    assert SITES.keys() == BY_NAME.keys()


@pytest.mark.parametrize(
    ("site", "families"),
    [
        ("unet.mid_block.x.attn1.to_q", ["Stable Diffusion", "Stable Diffusion XL"]),
        ("unet.new_blocks.x.attn1.to_q", []),
        ("unet.mid_block.x.attn3.to_q", []),
        ("unet.mid_block.x.attn1.to_out.1", []),
        ("unet.conv_in", []),
        ("text_encoder.encoder.layers.0.mlp.fc1", ["Stable Diffusion", "Stable Diffusion XL", "FLUX.1",
                                                   "Stable Diffusion 3"]),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", ["Stable Diffusion XL", "Stable Diffusion 3"]),
        ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", []),
        ("transformer.transformer_blocks.0.attn.to_q", ["FLUX.1", "FLUX.2 klein", "Stable Diffusion 3", "Qwen-Image",
                                                        "Krea 2"]),
        ("transformer.transformer_blocks.0.attn.to_gate", ["Krea 2"]),
        ("transformer.transformer_blocks.0.attn.norm_q", []),
        ("transformer.transformer_blocks.x.attn.to_q", []),
        ("transformer.x_embedder", []),
        ("vae.mid_block.attentions.0.to_q", []),
    ],
)  # fmt: skip
def test_which_families_have_a_layer_of_that_name(site: str, families: list[str]) -> None:
    assert [family.name for family in FAMILIES if family.has_site(site)] == families
