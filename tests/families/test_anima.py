"""Anima, which is read and written but not recorded: its layers are what the family says, and others' are not its."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusers_mixofshow import GradientFuser, LoRASource
from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.families.anima import ANIMA
from diffusers_mixofshow.families.layers import linear_layers
from diffusers_mixofshow.interop import read_lora, write_kohya
from diffusers_mixofshow.interop.foreign import read_foreign
from diffusers_mixofshow.interop.summary import summary_of_foreign
from families.pipelines import is_here, tiny_pipeline
from families.spellings import times_in_original


pytestmark = pytest.mark.skipif(not is_here(ANIMA), reason="The installed diffusers is older than Anima.")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("Anima")


def test_its_layers_read_what_the_family_says(pipe: Any) -> None:
    """By two calls of the transformer at two times with one text."""
    transformer, layers = pipe.components["transformer"], linear_layers(pipe.components)
    assert family_of(pipe.components) is ANIMA
    blocks = {
        f"transformer.{path}"
        for path, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and path.startswith("transformer_blocks.")
    }
    assert layers.keys() == blocks
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, inputs, site=site: seen.setdefault(site, []).append(inputs[0].clone())
        )
        for site, layer in layers.items()
    ]
    latents, text = torch.randn(1, 4, 1, 8, 8), torch.randn(1, 5, 1024)
    for time in (0.9, 0.4):
        transformer(
            hidden_states=latents,
            timestep=torch.tensor([time]),
            encoder_hidden_states=text,
            padding_mask=torch.zeros(1, 1, 8, 8),
        )
    for hook in hooks:
        hook.remove()
    assert seen.keys() == blocks
    for name, sites in ANIMA.by_input(seen).items():
        assert all(torch.equal(seen[site][0], seen[sites[0]][0]) for site in sites), name
    for site, (first, second) in seen.items():
        assert torch.equal(first, second) is ANIMA.stage_of(site).text_alone, site
        assert ANIMA.group_of(site) != "other"
    alike = [
        (one, two)
        for one in seen
        for two in seen
        if one < two and ANIMA.input_of(one) != ANIMA.input_of(two) and seen[one][0].shape == seen[two][0].shape
    ]
    assert [pair for pair in alike if torch.equal(seen[pair[0]][0], seen[pair[1]][0])] == []


def test_its_original_code_has_every_layer_once(pipe: Any) -> None:
    assert set(times_in_original(ANIMA, pipe).values()) == {1}


ATTENTION = "transformer_blocks.0.{}"


@pytest.mark.parametrize(
    ("layers", "read"),
    [
        ({"attn2.to_k": 1024, "attn1.to_q": 8}, True),
        ({"attn2.to_v": 1024}, True),
        ({"attn2.to_k": 2048, "attn1.to_q": 8}, False),  # as LTX-Video's
        ({"attn2.to_k": 1024, "attn2.to_v": 1152, "attn1.to_q": 8}, False),
        ({"attn1.to_q": 8}, False),
        ({"ff.net.0.proj": 8, "attn1.to_k": 8}, False),
    ],
)
@pytest.mark.parametrize("prefix", ["transformer.", "", "lora_transformer_"])
def test_names_that_others_share_are_its_own_where_they_read_its_text(
    layers: dict[str, int], read: bool, prefix: str, tmp_path: Path
) -> None:
    halves = ("lora_down", "lora_up") if prefix.endswith("_") else ("lora_A", "lora_B")
    tensors = {}
    for path, width in layers.items():
        name = ATTENTION.format(path)
        name = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        tensors |= {f"{name}.{halves[0]}.weight": torch.ones(2, width), f"{name}.{halves[1]}.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    told = summary_of_foreign(read_foreign(tmp_path / "x.safetensors"))
    if read:
        assert (told["architecture"], told["problems"], told["adapted_layers"]) == ("Anima", [], len(layers))
    else:
        (problem,) = told["problems"]
        assert problem.startswith("made for a transformer such as PixArt, Sana, LTX-Video or CogVideoX")


@pytest.mark.parametrize(
    "layer",
    [
        "lora_unet_llm_adapter_blocks_0_self_attn_q_proj",
        "diffusion_model.llm_adapter.blocks.0.self_attn.q_proj",
        "text_conditioner.blocks.0.self_attn.q_proj",
    ],
)
def test_updates_of_its_text_conditioner_are_told(layer: str, tmp_path: Path) -> None:
    pairs = {
        f"{name}.{half}.weight": torch.ones(4, 4)
        for name in (layer, "lora_unet_blocks_0_self_attn_q_proj")
        for half in ("lora_down", "lora_up")
    }
    save_file(pairs, tmp_path / "x.safetensors")
    (defect,) = read_foreign(tmp_path / "x.safetensors").defects
    assert defect.startswith(f"updates of Anima's text conditioner, which are not supported: 2 ({layer}.")


def test_it_is_merged_without_a_pipeline_and_refused_with_one(pipe: Any, tmp_path: Path) -> None:
    site = "transformer.transformer_blocks.0.attn2.to_k"
    generator, files = torch.Generator().manual_seed(0), []
    for number in range(2):
        update = LowRank(
            down=torch.randn(2, 1024, generator=generator), up=torch.randn(32, 2, generator=generator), alpha=2.0
        )
        files.append(write_kohya(tmp_path / f"{number}.safetensors", {site: update}))
    fused = GradientFuser().fuse([LoRASource(file, ["a dog"]) for file in files], method="average")
    expected = sum(low_rank_delta(read_lora(file)[site]) for file in files) / 2
    torch.testing.assert_close(low_rank_delta(fused.lora[site]), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        FusionError, match=r"AnimaModularPipeline: Anima has only a modular pipeline.*method='average'"
    ):
        GradientFuser(pipe)
