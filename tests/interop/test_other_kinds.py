"""Files that are no LoRA or embedding of Stable Diffusion are told by their own names, and never read as one."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

import tiny
from diffusers_mixofshow import cli
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import EDLoRAFormatError
from diffusers_mixofshow.families import FAMILIES
from diffusers_mixofshow.families.stable_diffusion import SD1
from diffusers_mixofshow.interop import convert
from diffusers_mixofshow.interop.foreign import Kind, read_foreign
from diffusers_mixofshow.interop.formats import Format
from diffusers_mixofshow.interop.lora_files import read_lora
from diffusers_mixofshow.interop.summary import summary_of_foreign


SITE = "mid_block.attentions.0.transformer_blocks.0.attn2"
FLAT = f"lora_unet_{SITE.replace('.', '_')}_to_k"
PAIR = {f"{FLAT}.lora_down.weight": (4, 768), f"{FLAT}.lora_up.weight": (1280, 4)}


def told(tmp_path: Path, shapes: dict[str, tuple[int, ...]], *, pickled: bool = False) -> tuple[Kind, str]:
    """What a file of ones is read as, and its problems."""
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    path = tmp_path / ("x.bin" if pickled else "x.safetensors")
    torch.save(tensors, path) if pickled else save_file(tensors, path)
    found = read_foreign(path)
    return found.kind, " / ".join(summary_of_foreign(found)["problems"])


# Names and shapes as LyCORIS 4.1 writes them (`create_lycoris(...).state_dict()`), an alpha beside most.
LYCORIS = {
    "LoHa": {f"hada_w{n}_{half}": (8, 8) for n in "12" for half in "ab"} | {"alpha": ()},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2_a": (4, 4), "lokr_w2_b": (4, 4), "alpha": ()},
    "GLoRA": {f"{half}.weight": (8, 8) for half in ("a1", "a2", "b1", "b2")} | {"alpha": ()},
    "full differences": {"diff": (8, 8), "diff_b": (8,)},
    "OFT": {"oft_blocks": (4, 4, 4), "alpha": ()},
    "OFT or BOFT": {"oft_blocks": (3, 4, 4, 4), "rescale": (8, 1), "alpha": ()},
    "(IA)^3": {"weight": (8,), "on_input": ()},
    "T-LoRA": {"q_layer.weight": (4, 8), "p_layer.weight": (8, 4), "lambda_layer": (1, 4), "alpha": ()},
    "trained norms": {"w_norm": (8,), "b_norm": (8,)},
    "DoRA": {"lora_down.weight": (4, 8), "lora_up.weight": (8, 4), "dora_scale": (8, 1), "alpha": ()},
    "Tucker": {"lora_down.weight": (4, 8), "lora_up.weight": (8, 4), "lora_mid.weight": (4, 4, 3, 3), "alpha": ()},
    "a trained scalar": {"lora_down.weight": (4, 8), "lora_up.weight": (8, 4), "scalar": ()},
}
OTHERS = {
    "Custom Diffusion": {
        f"{layer}.processor.to_{half}_custom_diffusion.weight": (32, 76) for layer in SD1.layers for half in "kv"
    },
    "weights of Custom Diffusion": {f"{SITE}.processor.to_k_custom_diffusion.weight": (320, 768)},
    "motion layers of AnimateDiff": {
        f"down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attn1.to_q.{half}.weight": shape
        for half, shape in (("lora_A", (4, 8)), ("lora_B", (8, 4)))
    },
    "an IP-Adapter": {"ip_adapter.1.to_k_ip.weight": (320, 768), "image_proj.norm.weight": (768,)},
    "ControlNet-LLLite": {"lllite_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.cond_emb.weight": (32, 32)},
    "a ControlNet": {"control_model.input_hint_block.0.weight": (16, 768)},
    "embeddings for T5": {"clip_l": (2, 768), "t5": (2, 4096)},
    "LoRA of an embedding layer": {
        "base_model.model.text_model.embeddings.token_embedding.lora_embedding_A": (4, 49408 // 1024),
        "base_model.model.text_model.embeddings.token_embedding.lora_embedding_B": (768, 4),
    },
    "full weights of the base": {
        f"base_model.model.{SITE}.to_k.base_layer.weight": (8, 8),
        f"base_model.model.{SITE}.to_k.lora_A.default.weight": (4, 8),
        f"base_model.model.{SITE}.to_k.lora_B.default.weight": (8, 4),
    },
    "biases": {f"unet.{SITE}.to_out.0.lora_B.bias": (8,)},
}


@pytest.mark.parametrize("kind", LYCORIS)
@pytest.mark.parametrize("prefix", [FLAT, f"lycoris_{SITE.replace('.', '_')}_to_k", f"diffusion_model.{SITE}.to_k"])
def test_layers_of_lycoris_are_told_by_their_names(tmp_path: Path, kind: str, prefix: str):
    read, problems = told(tmp_path, {f"{prefix}.{name}": shape for name, shape in LYCORIS[kind].items()})
    assert kind in problems
    assert read is (Kind.LORA if "lora_down.weight" in LYCORIS[kind] else Kind.OTHER)
    for other in ("no known meaning", "alphas without", "not a pair", "made for"):
        assert other not in problems


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("pickled", [False, True])
def test_files_of_another_kind_are_told_by_their_names(tmp_path: Path, kind: str, pickled: bool):
    read, problems = told(tmp_path, OTHERS[kind], pickled=pickled)
    assert kind in problems
    assert read in (Kind.OTHER, Kind.LORA)


@pytest.mark.parametrize("kind", [*LYCORIS, *OTHERS])
def test_none_of_them_is_converted_or_fused(tmp_path: Path, kind: str):
    shapes = OTHERS.get(kind) or {f"{FLAT}.{name}": shape for name, shape in LYCORIS[kind].items()}
    told(tmp_path, shapes)
    for to in Format:
        with pytest.raises(EDLoRAFormatError):
            convert(tmp_path / "x.safetensors", tmp_path / "out", to)
    with pytest.raises(EDLoRAFormatError):
        read_lora(tmp_path / "x.safetensors")
    assert not (tmp_path / "out").exists()


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_k, self.to_q = nn.Linear(16, 16), nn.Linear(16, 16)


METHODS = {
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "OFTConfig": {"oft_block_size": 4},
    "BOFTConfig": {"boft_block_size": 4},
    "IA3Config": {"feedforward_modules": []},
    "VeraConfig": {"r": 4},
    "HRAConfig": {"r": 4},
    "LNTuningConfig": {},
    "FourierFTConfig": {"n_frequency": 9},
    "RandLoraConfig": {"r": 4},
    "AdaLoraConfig": {"total_step": 10},
    "ShiraConfig": {"r": 4},
    "MissConfig": {"r": 4},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [True, False])
def test_every_other_method_of_peft_is_told_as_peft_writes_it(tmp_path: Path, method: str, settings: bool):
    cls = getattr(peft, method)
    model = get_peft_model(_Model(), cls(target_modules=["to_k", "to_q"], **METHODS[method]))
    model.save_pretrained(tmp_path)
    if not settings:
        (tmp_path / "adapter_config.json").unlink()
    found = read_foreign(tmp_path)
    assert (found.kind, dict(found.lora)) == (Kind.OTHER, {})
    name = method.removesuffix("Config").replace("IA3", "(IA)^3").replace("LNTuning", "LN tuning")
    (defect,) = found.defects
    assert name.lower() in defect.lower()


@pytest.mark.parametrize(
    ("name", "options", "base"),
    [
        ("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1}, "FLUX"),
        ("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}, "FLUX.2"),
        ("ChromaTransformer2DModel", {"num_layers": 1, "num_single_layers": 1}, "Chroma"),
        ("SD3Transformer2DModel", {"num_layers": 2}, "Stable Diffusion 3"),
        ("QwenImageTransformer2DModel", {"num_layers": 1}, "Qwen-Image"),
        ("WanTransformer3DModel", {"num_layers": 1}, "Wan"),
        ("HunyuanVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1}, "HunyuanVideo"),
        ("ZImageTransformer2DModel", {"n_layers": 1}, "Z-Image"),
        ("Lumina2Transformer2DModel", {"num_layers": 1}, "Lumina"),
        ("LTXVideoTransformer3DModel", {"num_layers": 1}, "LTX-Video"),
        ("PixArtTransformer2DModel", {"num_layers": 1}, "PixArt"),
        ("SanaTransformer2DModel", {"num_layers": 1}, "Sana"),
        ("CogVideoXTransformer3DModel", {"num_layers": 1}, "CogVideoX"),
        ("AuraFlowTransformer2DModel", {"num_mmdit_layers": 1, "num_single_dit_layers": 1}, "AuraFlow"),
    ],
)
@pytest.mark.parametrize("spelling", ["transformer.{}.lora_A", "base_model.model.{}.lora_A", "{}.lora_A", "kohya"])
def test_a_lora_of_another_base_is_told_as_made_for_it(tmp_path: Path, name: str, options, base: str, spelling: str):
    """Layers of the true classes, adapted in their attention and feed-forward parts, as everybody does."""
    with torch.device("meta"):
        model = getattr(diffusers, name)(**options)
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and "block" in path]
    layers += [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and "layers." in path]
    shapes = {}
    for layer in dict.fromkeys(layers):
        down = f"lora_unet_{layer.replace('.', '_')}.lora_down" if spelling == "kohya" else spelling.format(layer)
        up = down.replace("lora_down", "lora_up").replace("lora_A", "lora_B")
        shapes |= {f"{down}.weight": (1, 3), f"{up}.weight": (3, 1)}
    read, problems = told(tmp_path, shapes)
    assert read is Kind.LORA
    if name in {family.denoiser_class for family in FAMILIES}:
        unknown = "alpha is not known: PEFT keeps it in adapter_config.json"
        assert problems.startswith(unknown if spelling.startswith("base_model") else "")
        assert problems == "" or spelling.startswith("base_model")
        summary = summary_of_foreign(read_foreign(tmp_path / "x.safetensors"))
        assert base in summary["architecture"]
        return
    assert problems.startswith("made for ")
    assert base in problems.partition(", with layers that no supported base has")[0]
    assert f": {len(shapes) // 2} (" in problems
    assert "not a pair" not in problems


@pytest.mark.parametrize(
    ("layer", "base"),
    [
        ("lora_unet_double_blocks_0_img_mlp_fc1", "HunyuanVideo"),
        ("lora_unet_double_blocks_0_cross_attn_qkv", "FLUX"),
        ("diffusion_model.single_blocks.0.linear3", "FLUX"),
        ("lora_unet_joint_blocks_0_context_block_attn_q", "Stable Diffusion 3"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_b", "FLUX"),
        ("lora_unet_blocks_0_cross_attn_k", "Wan"),
        ("lora_unet_blocks_0_ffn_0", "Wan"),
        ("diffusion_model.blocks.25.cross_attn.k_img", "Wan"),
        ("lora_unet_blocks_0_cross_attn_output_proj_0", "Cosmos or Anima"),
        ("diffusion_model.transformer_blocks.0.attn1.to_q", "LTX-Video"),
        ("double_stream_blocks.0.block.attn1.to_q", "HiDream"),
        ("diffusion_model.blocks.0.img_mlp.w1", "Qwen-Image"),
        ("lora_prior_unet_down_blocks_0_1_attention_attn_to_q", "Stable Cascade"),
        ("base_model.model.model.layers.0.self_attn.q_proj", "a language model"),
    ],
)
def test_other_bases_in_the_names_of_other_programs(tmp_path: Path, layer: str, base: str):
    peft_names = "." in layer
    halves = ("lora_A", "lora_B") if peft_names else ("lora_down", "lora_up")
    shapes = {f"{layer}.{halves[0]}.weight": (4, 3072), f"{layer}.{halves[1]}.weight": (3072, 4)}
    _, problems = told(tmp_path, shapes | ({} if peft_names else {f"{layer}.alpha": ()}))
    assert base in problems.partition(", with layers that no supported base has")[0]
    assert problems.count(" / ") == 0


@pytest.mark.parametrize(
    ("layer", "family"),
    [
        ("diffusion_model.layers.25.attention.to_v", "Z-Image"),
        ("diffusion_model.layers.0.feed_forward.w1", "Z-Image"),
        ("diffusion_model.transformer_blocks.0.img_mlp.net.0.proj", "Qwen-Image"),
        (
            "transformer.transformer_blocks.0.attn.add_k_proj",
            "FLUX.1 or FLUX.2 klein or Stable Diffusion 3 or Qwen-Image",
        ),
        ("single_transformer_blocks.0.proj_mlp", "FLUX.1"),
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", "FLUX.2 klein"),
    ],
)
def test_layers_that_known_transformers_have_are_read(tmp_path: Path, layer: str, family: str):
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(4, 32), f"{layer}.lora_B.weight": torch.ones(32, 4)}, tmp_path / "x"
    )
    (tmp_path / "x").rename(tmp_path / "x.safetensors")
    found = read_foreign(tmp_path / "x.safetensors")
    summary = summary_of_foreign(found)
    assert (summary["architecture"], summary["problems"]) == (family, [])
    path = layer.removeprefix("transformer.").removeprefix("diffusion_model.")
    assert list(found.lora) == [f"transformer.{path}"]


def test_a_text_encoder_beside_another_base_does_not_save_it(tmp_path: Path):
    clip = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    wan = "lora_unet_blocks_0_cross_attn_k"
    pairs = {f"{name}.{half}.weight": (4, 4) for name in (clip, wan) for half in ("lora_down", "lora_up")}
    _, problems = told(tmp_path, pairs)
    assert problems.startswith("made for Wan")
    assert f"with layers that no supported base has: 1 ({wan})" in problems


def test_layers_that_another_base_shares_with_a_known_one_do_not_save_it(tmp_path: Path):
    """HunyuanVideo's double blocks are called like FLUX.1's but for the feed-forward layers."""
    shared = [f"lora_unet_double_blocks_0_{name}" for name in ("img_attn_qkv", "txt_attn_qkv", "img_attn_proj")]
    pairs = {}
    for name in (*shared, "lora_unet_double_blocks_0_img_mlp_fc1"):
        rows = 3 * 8 if name.endswith("qkv") else 8
        pairs |= {f"{name}.lora_down.weight": (2, 8), f"{name}.lora_up.weight": (rows, 2)}
    _, problems = told(tmp_path, pairs)
    assert problems.startswith("made for HunyuanVideo or HunyuanImage, with layers that no supported base has: 4 (")
    assert problems.count(" / ") == 0


@pytest.mark.parametrize(
    "layer",
    [
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q",  # OneTrainer for FLUX.1
        "lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
        "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wo",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    ],
)
def test_updates_of_t5_are_told_as_that_and_nothing_else(tmp_path: Path, layer: str):
    clip, flux = "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_double_blocks_0_img_attn_proj"
    pairs = {f"{name}.{half}.weight": (4, 4) for name in (clip, flux, layer) for half in ("lora_down", "lora_up")}
    _, problems = told(tmp_path, pairs | {f"{name}.alpha": () for name in (clip, flux, layer)})
    assert problems.startswith("updates of T5, a text encoder of Stable Diffusion 3 and FLUX")
    assert f": 3 ({layer}." in problems
    assert problems.count(" / ") == 0


def test_a_checkpoint_of_a_known_or_another_base_is_told_by_its_names(tmp_path: Path):
    _, problems = told(tmp_path, {f"double_blocks.{n}.img_attn.proj.weight": (1,) for n in range(70)})
    assert problems.startswith(
        "full weights, as in a checkpoint, where a LoRA has pairs of matrices: 70 (double_blocks.0"
    )
    assert problems.count(" / ") == 0
    _, problems = told(tmp_path, {f"blocks.{n}.cross_attn.k.weight": (1,) for n in range(70)})
    assert "made for Wan" in problems


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        ({f"{FLAT}.alpha": ()}, f"alphas without matrices: 1 (unet.{SITE}.to_k)"),
        (PAIR | {f"{FLAT[:-1]}v.alpha": ()}, f"alphas without matrices: 1 (unet.{SITE}.to_v)"),
        (
            {f"{FLAT}.lora_down.weight": (4, 768), f"{FLAT}.alpha": ()},
            f"only one of the two matrices, down or up: 1 (unet.{SITE}.to_k)",
        ),
        (
            {
                "lora_unet_time_embedding_linear_1.lora_down.weight": (4, 320),
                "lora_unet_time_embedding_linear_1.lora_up.weight": (1280, 4),
            },
            "unsupported layers; supported are attention, feed-forward layers and projections: 1 "
            "(unet.time_embedding.linear_1)",
        ),
        (
            {
                "diffusion_model.time_embed.0.lora_down.weight": (4, 320),
                "diffusion_model.time_embed.0.lora_up.weight": (1280, 4),
            },
            "unsupported layers; supported are",
        ),
        (
            {
                "lora_te2_text_projection.lora_down.weight": (4, 1280),
                "lora_te2_text_projection.lora_up.weight": (1280, 4),
            },
            "unsupported layers; supported are",
        ),
        (
            {"unet.conv_in.lora_A.weight": (4, 4, 3, 3), "unet.conv_in.lora_B.weight": (320, 4, 1, 1)},
            "not a pair of matrices of a linear layer or 1 x 1 convolution: 1 (unet.conv_in)",
        ),
        (
            {f"{FLAT}.lora_down.weight": (4, 768), f"{FLAT}.lora_up.weight": (1280, 5)},
            f"not a pair of matrices of a linear layer or 1 x 1 convolution: 1 (unet.{SITE}.to_k)",
        ),
        (
            {f"{FLAT}.lora_down.weight": (0, 768), f"{FLAT}.lora_up.weight": (1280, 0)},
            f"not a pair of matrices of a linear layer or 1 x 1 convolution: 1 (unet.{SITE}.to_k)",
        ),
        ({f"{FLAT}.alpha": (2,)}, f"tensors of no known meaning: 1 ({FLAT}.alpha)"),
        (PAIR | {"something.else": (3, 3)}, "tensors of no known meaning: 1 (something.else)"),
    ],
)
def test_what_is_amiss_with_a_layer_is_told_as_that(tmp_path: Path, shapes, problem: str):
    _, problems = told(tmp_path, shapes)
    assert problem in problems
    assert problems.count("unet.") <= 1


# --- words and adapters' names ---


@pytest.mark.parametrize(
    "shapes",
    [
        {"position_embedding.weight": (77, 768)},
        {"weight": (4, 768)},
        {"weight": (768,), "bias": (768,)},
        {"gamma": (768,), "beta": (768,)},
        {"class_embedding": (77, 768)},  # more vectors than a prompt has room for
        {"proj": (320, 512)},
        {"first": (4, 768), "second": (4, 1024)},  # of two text encoders
        {"<first>": (4, 768), "<second>": (4, 32)},
        {"lora_A": (4, 100), "lora_B": (100, 4)},
        {f"layer{n}.weight": (8, 768) for n in range(3)},
        {"text_model.embeddings.token_embedding.weight": (10, 768)},
        {"learned.embeds": (2, 768)},
        {"class_embedding": (768,)},
        {"position_embedding": (50, 768)},
        {"features": (1, 768)},
        {"text_embeds": (1, 768)},
        {"pooled_prompt_embeds": (1, 1280)},
        {"running_mean": (768,)},
        {"text_projection": (4, 768)},
        {"last_hidden_state": (4, 768)},
        {"lora_A": (4, 768)},
        {"lora_down": (4, 768)},
        {f"lora_unet_{SITE.replace('.', '_')}_to_k": (4, 768)},
        {"mean": (768,), "variance": (768,)},
        {"first": (4, 768), "second": (4, 768)},  # two without brackets, which no program writes
        {"<first>": (4, 768), "mean": (4, 768)},
    ],
    ids=lambda shapes: ",".join(shapes)[:40],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_small_matrices_are_no_words(tmp_path: Path, shapes, pickled: bool):
    read, problems = told(tmp_path, shapes, pickled=pickled)
    assert read is Kind.OTHER
    assert "tensors of no known meaning" in problems or "biases" in problems


def test_a_lone_tensor_is_a_word_only_with_the_width_of_one(tmp_path: Path):
    for shape, kind in (((2, 768), Kind.TEXTUAL_INVERSION), ((320, 768), Kind.OTHER), ((2, 320), Kind.OTHER)):
        torch.save(torch.ones(shape), tmp_path / "rex.pt")
        assert read_foreign(tmp_path / "rex.pt").kind is kind


@pytest.mark.parametrize(
    ("word", "width"),
    [
        ("<rex>", 768),
        ("rex", 768),
        ("rex the dog", 1024),
        ("<rex.v1>", 768),
        ("<a weight>", 768),
        ("猫", 768),
        ("llama", 768),
        ("lorasaurus", 768),
        ("meanie", 768),
        ("<lora_A>", 768),
        ("<features>", 768),
        ("<rex>", 32),
    ],
)
def test_words_of_embeddings_are_read_as_before(tmp_path: Path, word: str, width: int):
    save_file({word: torch.ones(75, width)}, tmp_path / "x.safetensors")
    found = read_foreign(tmp_path / "x.safetensors")
    assert (found.kind, list(found.vectors)) == (Kind.TEXTUAL_INVERSION, [word])


def test_a_lora_with_its_adapters_name_inside_is_a_lora(tmp_path: Path):
    unet = tiny.components()["unet"]
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_k"], init_lora_weights=False), adapter_name="default_0"
    )
    halves = {f"unet.{name}": half for name, half in unet.state_dict().items() if ".lora_" in name}
    assert any(".lora_A.default_0.weight" in name for name in halves)
    save_file(halves, tmp_path / "x.safetensors")
    found = read_foreign(tmp_path / "x.safetensors")
    assert (found.kind, found.defects) == (Kind.LORA, ())
    for site, update in found.lora.items():
        layer = unet.get_submodule(site.removeprefix("unet."))
        torch.testing.assert_close(low_rank_delta(update), layer.get_delta_weight("default_0"))


@pytest.mark.parametrize("other", [f"unet.{SITE}.to_k", f"unet.{SITE}.to_v"], ids=["same layer", "another layer"])
def test_two_adapters_in_one_file_are_not_mixed(tmp_path: Path, other: str):
    halves = {}
    for layer, adapter in ((f"unet.{SITE}.to_k", "potter"), (other, "thanos")):
        halves |= {f"{layer}.lora_A.{adapter}.weight": (4, 768), f"{layer}.lora_B.{adapter}.weight": (1280, 4)}
    _, problems = told(tmp_path, halves)
    assert "several adapters in one file; save the one to use on its own: " in problems
    assert "thanos" in problems


def test_an_adapter_without_a_name_beside_another_is_told(tmp_path: Path):
    halves = {}
    for layer, adapter in (("to_k", ""), ("to_v", ".thanos")):
        name = f"unet.{SITE}.{layer}"
        halves |= {f"{name}.lora_A{adapter}.weight": (4, 768), f"{name}.lora_B{adapter}.weight": (1280, 4)}
    _, problems = told(tmp_path, halves)
    assert "several adapters in one file; save the one to use on its own: 2 (without a name, thanos)" in problems


def test_adapters_of_two_models_may_have_two_names(tmp_path: Path):
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    halves = {f"{text}.lora_A.words.weight": (4, 768), f"{text}.lora_B.words.weight": (768, 4)}
    halves |= {f"unet.{SITE}.to_k.lora_A.look.weight": (4, 768), f"unet.{SITE}.to_k.lora_B.look.weight": (1280, 4)}
    assert told(tmp_path, halves) == (Kind.LORA, "")


def test_names_of_lycoris_alone_are_a_lora(tmp_path: Path):
    """As `create_lycoris(unet, ...)` and trainers on it write them; rank-stabilised ones hold an alpha that fits."""
    layer = f"lycoris_{SITE.replace('.', '_')}_to_k"
    text = "lycoris_text_model_encoder_layers_0_self_attn_q_proj"
    shapes = {
        f"{name}.{half}.weight": shape
        for name in (layer, text)
        for half, shape in (("lora_down", (4, 768)), ("lora_up", (768, 4)))
    }
    told(tmp_path, shapes | {f"{layer}.alpha": (), f"{text}.alpha": ()})
    lora = read_foreign(tmp_path / "x.safetensors").lora
    assert {site: update.scaling for site, update in lora.items()} == {
        f"unet.{SITE}.to_k": 0.25,
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": 0.25,
    }


@pytest.mark.parametrize("kind", ["Custom Diffusion", "LoHa", "T-LoRA"])
def test_inspect_tells_it_and_ends_with_1(tmp_path: Path, kind: str, monkeypatch, capsys):
    shapes = OTHERS.get(kind) or {f"{FLAT}.{name}": shape for name, shape in LYCORIS[kind].items()}
    told(tmp_path, shapes)
    monkeypatch.setattr("sys.argv", ["mixofshow", "inspect", str(tmp_path / "x.safetensors"), "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    summary = json.loads(capsys.readouterr().out)
    assert (end.value.code, summary["kind"], summary["concepts"]) == (1, "neither LoRA nor embeddings", [])
    assert kind in summary["problems"][0]
