"""Plain LoRA files in every spelling that is around, and what no low-rank update can say."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

import tiny
from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.edlora.file import PLAIN_NAME
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError
from diffusers_mixofshow.interop.lora_files import read_lora, write_lora
from diffusers_mixofshow.lora import low_rank_delta


ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
QUERY = f"unet.{ATTENTION}.to_q"


def _halves(rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, 6), torch.randn(8, rank)


@pytest.mark.parametrize(
    ("down", "up", "site"),
    [
        (f"unet.{ATTENTION}.to_q.lora_A.weight", f"unet.{ATTENTION}.to_q.lora_B.weight", QUERY),
        (f"unet.{ATTENTION}.to_q.lora.down.weight", f"unet.{ATTENTION}.to_q.lora.up.weight", QUERY),
        (
            f"unet.{ATTENTION}.processor.to_q_lora.down.weight",
            f"unet.{ATTENTION}.processor.to_q_lora.up.weight",
            QUERY,
        ),
        (
            f"unet.{ATTENTION}.processor.to_out_lora.down.weight",
            f"unet.{ATTENTION}.processor.to_out_lora.up.weight",
            f"unet.{ATTENTION}.to_out.0",
        ),
        (
            f"base_model.model.{ATTENTION}.to_q.lora_A.default.weight",
            f"base_model.model.{ATTENTION}.to_q.lora_B.default.weight",
            QUERY,
        ),
        (
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
            f"unet.{ATTENTION}.to_out.0",
        ),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj.lora_down.weight",
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj.lora_up.weight",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
        ),
        (
            "lora_te_text_model_encoder_layers_11_mlp_fc1.lora_down.weight",
            "lora_te_text_model_encoder_layers_11_mlp_fc1.lora_up.weight",
            "text_encoder.text_model.encoder.layers.11.mlp.fc1",
        ),
        (
            "text_encoder.encoder.layers.0.self_attn.k_proj.lora_linear_layer.down.weight",
            "text_encoder.encoder.layers.0.self_attn.k_proj.lora_linear_layer.up.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.k_proj",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
        ),
        (
            "lora_te2_text_model_encoder_layers_31_self_attn_v_proj.lora_down.weight",
            "lora_te2_text_model_encoder_layers_31_self_attn_v_proj.lora_up.weight",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.v_proj",
        ),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k.lora_down.weight",
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k.lora_up.weight",
            "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
        ),
        (
            "lora_unet_middle_block_1_proj_out.lora_down.weight",
            "lora_unet_middle_block_1_proj_out.lora_up.weight",
            "unet.mid_block.attentions.0.proj_out",
        ),
        (
            "diffusion_model.output_blocks.5.1.transformer_blocks.0.attn1.to_out.0.lora_down.weight",
            "diffusion_model.output_blocks.5.1.transformer_blocks.0.attn1.to_out.0.lora_up.weight",
            "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0",
        ),
        (
            "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc2.lora_down.weight",
            "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc2.lora_up.weight",
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc2",
        ),
        (
            "lora_unet_output_blocks_3_0_emb_layers_1.lora_down.weight",
            "lora_unet_output_blocks_3_0_emb_layers_1.lora_up.weight",
            "unet.up_blocks.1.resnets.0.time_emb_proj",
        ),
        (
            "lora_unet_down_blocks_1_resnets_0_conv_shortcut.lora_down.weight",
            "lora_unet_down_blocks_1_resnets_0_conv_shortcut.lora_up.weight",
            "unet.down_blocks.1.resnets.0.conv_shortcut",
        ),
    ],
)
def test_every_spelling_names_the_same_layer(tmp_path: Path, down: str, up: str, site: str) -> None:
    halves = _halves()
    save_file({down: halves[0], up: halves[1]}, tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2}')  # without it PEFT's own names tell no scaling
    lora = read_lora(tmp_path / "x.safetensors")
    assert list(lora) == [site]
    assert torch.equal(lora[site].down, halves[0])
    assert torch.equal(lora[site].up, halves[1])
    assert lora[site].scaling == 1


def test_alphas_ranks_and_convolutions_of_kohya(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    down, up = torch.randn(4, 6, 1, 1).half(), torch.randn(8, 4, 1, 1).half()
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    update = read_lora(tmp_path / "x.safetensors")["unet.mid_block.attentions.0.proj_in"]
    assert (update.down.shape, update.up.shape, update.scaling) == ((4, 6), (8, 4), 0.25)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_diffusers_saves_acts_the_same(tmp_path: Path, rslora: bool) -> None:
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    targets = ["to_q", "ff.net.0.proj", "proj_in"]
    config = LoraConfig(r=4, lora_alpha=3, target_modules=targets, use_rslora=rslora, init_lora_weights=False)
    pipe.unet.add_adapter(config)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    lora = read_lora(tmp_path / PLAIN_NAME)
    assert {site.rpartition("transformer_blocks.0.")[2].rpartition(".")[2] for site in lora} == {
        "to_q",
        "proj",
        "proj_in",
    }
    for site, update in lora.items():
        layer = pipe.unet.get_submodule(site.removeprefix("unet."))
        expected = layer.get_delta_weight("default").flatten(1)
        torch.testing.assert_close(low_rank_delta(update), expected)


def test_what_we_write_diffusers_loads(tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    layer = pipe.unet.get_submodule(f"{ATTENTION}.to_q")
    update = LowRank(down=torch.randn(3, layer.in_features), up=torch.randn(layer.out_features, 3), alpha=6.0)
    write_lora(tmp_path / "a" / PLAIN_NAME, {QUERY: update})
    assert [path.name for path in (tmp_path / "a").iterdir()] == [PLAIN_NAME]
    pipe.load_lora_weights(tmp_path / "a")
    loaded = pipe.unet.get_submodule(f"{ATTENTION}.to_q")
    torch.testing.assert_close(loaded.get_delta_weight(loaded.active_adapters[0]), low_rank_delta(update))


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_what_is_written_one_update_at_a_time_is_what_safetensors_writes(
    tmp_path: Path, dtype: torch.dtype | None
) -> None:
    shared, transposed = torch.randn(2, 6).double(), torch.randn(2, 8).half().T
    lora = {
        "unet.b": LowRank(down=shared, up=transposed.double(), alpha=2.0, convolution=True),
        "unet.a": LowRank(down=shared, up=torch.randn(4, 2).double(), alpha=1.0),
        "unet.c": LowRank(down=torch.randn(3, 5).bfloat16(), up=transposed.bfloat16()[:, [0, 1, 0]], alpha=3.0),
        "unet.d": LowRank(down=1e6 * torch.ones(1, 3), up=1e-6 * torch.ones(5, 1), alpha=1.0),
    }
    write_lora(tmp_path / "ours.safetensors", lora, {"note": "of ours"}, dtype=dtype)
    tensors = {}
    for site, update in lora.items():
        halves = (update if dtype is None else update.cast(dtype)).in_file
        tensors |= {f"{site}.lora_{half}.weight": one.clone() for half, one in zip("AB", halves, strict=True)}
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
        assert set(opened.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = opened.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
    assert metadata["note"] == "of ours"
    save_file(tensors, tmp_path / "theirs.safetensors", metadata=metadata)
    sizes = [path.stat().st_size for path in (tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors")]
    assert abs(sizes[0] - sizes[1]) < 200  # headers are spaced differently


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{QUERY}.lora_magnitude_vector": torch.ones(8)}, "DoRA, whose effect"),
        ({f"{QUERY}.dora_scale": torch.ones(8)}, "DoRA, whose effect"),
        ({"lora_unet_mid_block_x.hada_w1_a": torch.ones(8)}, "LoHa.*LyCORIS"),
        ({f"{QUERY}.lora_B.bias": torch.ones(8)}, "biases, which are not a low-rank update"),
        ({"conditioner.weight": torch.ones(8)}, "tensors of no known meaning"),
        ({f"{QUERY}.lora_A.weight": torch.ones(2, 6)}, "only one of the two matrices"),
        (
            {
                "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.ones(2, 6, 3, 3),
                "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": torch.ones(8, 2, 1, 1),
            },
            r"not a pair of matrices of a linear layer or 1 x 1 convolution: 1 \(unet.down_blocks.0.resnets.0.conv1\)",
        ),
        (
            {
                "lora_unet_input_blocks_4_0_in_layers_2.lora_down.weight": torch.ones(2, 6, 3, 3),
                "lora_unet_input_blocks_4_0_in_layers_2.lora_up.weight": torch.ones(8, 2, 1, 1),
            },
            r"unet\.down_blocks\.1\.resnets\.0\.conv1",
        ),
        (
            {
                f"{QUERY}.lora_A.weight": torch.ones(2, 6),
                f"{QUERY}.lora_B.weight": torch.ones(8, 2),
                "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": torch.ones(2, 6),
            },
            "given twice",
        ),
        (
            {f"{QUERY}.lora_A.weight": torch.ones(2, 6), f"{QUERY}.lora_B.weight": torch.full((8, 2), torch.nan)},
            "not finite",
        ),
        ({"bundle_emb.rex.string_to_param.*": torch.ones(2, 6)}, r"bundles embeddings.*rex"),
        ({}, "none of its tensors belongs"),
    ],
)
def test_what_is_no_lora_of_linear_layers_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(EDLoRAFormatError, match=message):
        read_lora(tmp_path / "x.safetensors")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EDLoRANotFoundError):
        read_lora(tmp_path / "none.safetensors")
    (tmp_path / "x.pt").write_bytes(b"\x80\x04pickle")
    with pytest.raises(EDLoRAFormatError, match="pickles are not read"):
        read_lora(tmp_path / "x.pt")
