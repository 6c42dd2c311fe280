"""From one format to another and back: nothing changes but what is told."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import packs
import tiny
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import ConfigurationError, EDLoRAFormatError
from diffusers_mixofshow.families.layers import cross_attention_layers, linear_layers
from diffusers_mixofshow.families.stable_diffusion import SD1
from diffusers_mixofshow.interop import convert, read_as_edlora, read_lora
from diffusers_mixofshow.interop.foreign import read_foreign
from diffusers_mixofshow.interop.lora_files import write_kohya
from diffusers_mixofshow.interop.original import write_original
from interop import foreign as files


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def components() -> dict[str, object]:
    return tiny.components()


def _same_or_folded(one, other) -> None:
    """The same updates but for scalings that are in `up`, where one rounding of float32 is allowed."""
    assert one.keys() == other.keys()
    for site, update in one.items():
        packs.assert_identical(update.down, other[site].down)
        packs.assert_identical(update.folded.up, other[site].up)
        torch.testing.assert_close(other[site].up.double(), update.scaling * update.up.double(), rtol=2e-7, atol=0)
        assert (other[site].alpha, other[site].convolution) == (update.rank, update.convolution)


def _same_updates(one, other) -> None:
    assert one.keys() == other.keys()
    for site, update in one.items():
        packs.assert_identical(update.down, other[site].down)
        packs.assert_identical(update.up, other[site].up)
        assert (update.alpha, update.convolution) == (other[site].alpha, other[site].convolution)


@pytest.mark.parametrize(
    "where", [Path, str, lambda folder: folder / "edlora.safetensors"], ids=["Path", "str", "file"]
)
@pytest.mark.parametrize("to", ["kohya", "diffusers", "textual-inversion", "edlora"])
def test_an_ed_lora_is_converted_from_where_it_lies(tmp_path: Path, components, to: str, where):
    pack = packs.random_pack(components)
    pack.save_pretrained(tmp_path / "ours")
    done = convert(where(tmp_path / "ours"), tmp_path / "out", to)
    expected = convert(pack, tmp_path / "expected", to)
    assert done.lost == expected.lost
    for one, other in zip(done.files, expected.files, strict=True):
        if one.suffix != ".safetensors":  # in whose headers entries stand in any order
            assert one.name == other.name
            continue
        torch.testing.assert_close(load_file(one), load_file(other), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_ranks_alphas_and_values_survive_the_way_there_and_back(tmp_path: Path, components, to: str, dtype):
    pack = packs.random_pack(components, "rex", "kit", ranks=(1, 4), alphas=(4.0, 1.0, 1 / 3), dtype=dtype)
    done = convert(pack, tmp_path / "out", to)
    lora, *embeddings, text = done.files
    # Where alphas differ in a file of kohya's names, programs disagree on the scaling: it is in the weights.
    (_same_or_folded if to == "kohya" else _same_updates)(pack.lora, read_lora(lora))
    assert [path.name for path in embeddings] == ["rex.safetensors", "kit.safetensors"]
    assert {path.parent for path in embeddings} == {tmp_path / "out" / "embeddings"}
    mean = torch.stack([pack.embeddings[token].double().mean(0).to(dtype) for token in ("<rex1>", "<rex2>")])
    assert torch.equal(load_file(embeddings[0])["<rex>"], mean)
    assert ("<lora:" in text.read_text()) == (to == "kohya")
    assert all(sentence in text.read_text() for sentence in done.lost)
    expected = pack.embeddings["<rex1>"].double()
    share = float((expected - expected.mean(0)).norm() / expected.norm())
    assert [sentence.partition(":")[0] for sentence in done.lost[1:]] == list(pack.embeddings)
    assert done.lost[1].startswith(f"<rex1>: {share:.1%} ")


def test_kohyas_names_of_stable_diffusion_1(tmp_path: Path):
    site = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    update = LowRank(down=torch.ones(2, 768), up=torch.ones(768, 2), alpha=1.0)
    conv = LowRank(down=torch.ones(2, 8), up=torch.ones(8, 2), alpha=0.1, convolution=True)
    lora = {site: update, "unet.mid_block.attentions.0.proj_in": conv}
    pack = EDLoRA(concepts=(), embeddings={}, lora=lora, base_model="", layers=())
    done = convert(pack, tmp_path / "x.safetensors", "kohya")
    assert done.files == (tmp_path / "x.safetensors",)
    tensors = load_file(tmp_path / "x.safetensors")
    assert set(tensors) == {
        f"{layer}.{part}"
        for layer in (
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_unet_mid_block_attentions_0_proj_in",
        )
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert tensors["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"].shape == (8, 2, 1, 1)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "2")
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {2.0}


def test_kohyas_names_of_sdxl(tmp_path: Path):
    sites = {
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder_2.text_model.encoder.layers.31.self_attn.k_proj": (
            "lora_te2_text_model_encoder_layers_31_self_attn_k_proj"
        ),
        "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k": (
            "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k"
        ),
        "unet.mid_block.attentions.0.proj_out": "lora_unet_middle_block_1_proj_out",
        "unet.up_blocks.0.attentions.2.transformer_blocks.0.ff.net.0.proj": (
            "lora_unet_output_blocks_2_1_transformer_blocks_0_ff_net_0_proj"
        ),
        "unet.up_blocks.1.resnets.1.conv_shortcut": "lora_unet_output_blocks_4_0_skip_connection",
        "unet.down_blocks.0.resnets.1.time_emb_proj": "lora_unet_input_blocks_2_0_emb_layers_1",
    }
    lora = {site: LowRank(down=torch.ones(1, 2048), up=torch.ones(8, 1), alpha=1.0) for site in sites}
    pack = EDLoRA(concepts=(), embeddings={}, lora=lora, base_model="", layers=())
    convert(pack, tmp_path / "x.safetensors", "kohya")
    assert {name.partition(".")[0] for name in load_file(tmp_path / "x.safetensors")} == set(sites.values())
    _same_updates(lora, read_lora(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(("to", "alphas"), [("kohya", (1.0,)), ("kohya", (1.0, 4.0)), ("diffusers", (1.0, 4.0))])
def test_diffusers_loads_what_we_write(tmp_path: Path, components, to: str, alphas: tuple[float, ...]):
    pack = packs.random_pack(components, "rex", ranks=(2,), alphas=alphas)
    file, embedding, _ = convert(pack, tmp_path, to).files
    pipe = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipe.load_lora_weights(file)
    pipe.load_textual_inversion(str(embedding))
    assert {"<rex>", "<rex>_1"} <= set(pipe.tokenizer.get_added_vocab())
    layers = linear_layers(components)
    for site, update in pack.lora.items():
        delta = layers[site].get_delta_weight(layers[site].active_adapters[0])
        torch.testing.assert_close(delta, low_rank_delta(update))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_authors_layout_and_back(tmp_path: Path, components, dtype):
    pack = packs.random_pack(components, "rex", ranks=(4,), alphas=(4.0, 2.0), dtype=dtype)
    (file,) = convert(pack, tmp_path, "mix-of-show").files
    assert file.name == "edlora_model-latest.pth"
    params = torch.load(file, weights_only=True)["params"]
    assert set(params) == {"new_concept_embedding", "text_encoder", "unet"}
    assert all(name.startswith("text_model.encoder.layers.") for name in params["text_encoder"])
    back = read_as_edlora(file, class_word="dog", kind="pet", base_model=pack.base_model)
    assert (back.concepts, back.layers, back.base_model) == (pack.concepts, pack.layers, pack.base_model)
    for token, rows in pack.embeddings.items():
        packs.assert_identical(rows, back.embeddings[token])
    for site, update in pack.lora.items():
        packs.assert_identical(back.lora[site].up, update.scaling * update.up)
        assert math.isclose(back.lora[site].scaling, 1)
        assert torch.equal(low_rank_delta(back.lora[site]), low_rank_delta(update))


def test_the_authors_checkpoint_becomes_an_ed_lora(tmp_path: Path):
    params = files.original(tmp_path / "rex.pth")
    done = convert(tmp_path / "rex.pth", tmp_path / "rex", "edlora", name="buddy", class_word="dog")
    assert "base model" in done.lost[0]
    buddy = EDLoRA.from_pretrained(tmp_path / "rex")
    assert buddy.base_model.endswith("stable-diffusion-v1-5")
    assert buddy.concepts == (Concept.from_name("buddy", "dog"),)
    assert torch.equal(buddy.embeddings["<buddy2>"], params["new_concept_embedding"]["<rex2>"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_textual_inversion_and_back(tmp_path: Path, dtype):
    vectors = torch.randn(3, 768, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"<rex>": vectors}, tmp_path / "learned_embeds.safetensors")
    rex = read_as_edlora(tmp_path / "learned_embeds.safetensors", base_model="someone/base")
    assert all(len(rows) == len(SD1.layers) for rows in rex.embeddings.values())
    done = convert(rex, tmp_path / "rex.safetensors", "textual-inversion")
    assert done.lost == ()
    packs.assert_identical(load_file(tmp_path / "rex.safetensors")["<rex>"], vectors)


def test_a_textual_inversion_cannot_hold_updates_and_tells_of_how_many_layers(tmp_path: Path):
    pack = packs.random_pack(tiny.components(), "rex")
    layers = Counter(site.split(".")[0] for site in pack.lora)
    assert set(layers) == {"unet", "text_encoder"}
    done = convert(pack, tmp_path / "rex.safetensors", "textual-inversion")
    told = ", ".join(f"{count} of {component}" for component, count in layers.items())
    assert done.lost[-1] == f"The weight updates of all {len(pack.lora)} layers: {told}."


def test_embeddings_of_sdxl_stay_as_they_are(tmp_path: Path):
    vectors = {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}
    save_file(vectors, tmp_path / "rex_emb.safetensors")
    site = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    halves = {f"{site}.lora_down.weight": torch.ones(2, 1280), f"{site}.lora_up.weight": torch.ones(8, 2)}
    save_file(halves, tmp_path / "rex.safetensors")
    _, embedding, _ = convert(tmp_path, tmp_path / "out", "diffusers").files
    written = load_file(embedding)
    assert all(torch.equal(written[encoder], rows) for encoder, rows in vectors.items())
    convert(tmp_path, tmp_path / "own", "edlora", base_model="someone/xl")
    own = EDLoRA.from_pretrained(tmp_path / "own")
    assert (len(own.layers), own.layers[0], own.layers[-1]) == (
        11,
        "down_blocks.1.attentions.0",
        "up_blocks.1.attentions.2",
    )
    back = convert(own, tmp_path / "back", "diffusers")
    assert back.lost == ()
    (again,) = (tmp_path / "back" / "embeddings").glob("*.safetensors")
    assert all(torch.equal(load_file(again)[encoder], rows) for encoder, rows in vectors.items())


def test_layers_of_a_transformer_have_names_in_formats_of_today_alone(tmp_path: Path):
    layer = "transformer.single_transformer_blocks.0.proj_mlp"
    halves = {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    save_file(halves, tmp_path / "flux.safetensors")
    with pytest.raises(EDLoRAFormatError, match=rf"layout cannot hold layers .*: 1 \({layer}\)"):
        convert(tmp_path / "flux.safetensors", tmp_path / "no", "mix-of-show")
    assert not (tmp_path / "no").exists()
    convert(tmp_path / "flux.safetensors", tmp_path / "yes", "diffusers")
    assert load_file(tmp_path / "yes" / "pytorch_lora_weights.safetensors").keys() == halves.keys()
    (file,) = convert(tmp_path / "flux.safetensors", tmp_path / "kohya.safetensors", "kohya").files
    written = load_file(file)
    whole = "lora_unet_single_blocks_0_linear1"
    assert written.keys() == {f"{whole}.lora_down.weight", f"{whole}.lora_up.weight"}
    assert torch.equal(written[f"{whole}.lora_up.weight"], torch.cat([torch.zeros(24, 2), torch.ones(32, 2)]))


def test_what_a_format_cannot_hold(tmp_path: Path, components):
    files.kohya(tmp_path / "style.safetensors")
    with pytest.raises(EDLoRAFormatError, match="It holds no embedding"):
        convert(tmp_path / "style.safetensors", tmp_path / "out", "edlora")
    with pytest.raises(EDLoRAFormatError, match="no textual inversion to write"):
        convert(tmp_path / "style.safetensors", tmp_path / "out", "textual-inversion")
    pack = packs.random_pack(components, "rex", "kit")
    with pytest.raises(EDLoRAFormatError, match="holds 2 concepts"):
        convert(pack, tmp_path / "out.safetensors", "textual-inversion")
    with pytest.raises(EDLoRAFormatError, match="It holds no LoRA"):
        convert(replace(pack, lora={}), tmp_path / "out", "kohya")
    sdxl = {"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": next(iter(pack.lora.values()))}
    with pytest.raises(EDLoRAFormatError, match="second text encoder"):
        convert(replace(pack, lora=sdxl), tmp_path / "out", "mix-of-show")
    assert not list(tmp_path.glob("out*"))


def test_a_plain_lora_needs_no_instructions(tmp_path: Path):
    files.kohya(tmp_path / "style.safetensors")
    done = convert(tmp_path / "style.safetensors", tmp_path / "out", "diffusers")
    assert [path.name for path in done.files] == ["pytorch_lora_weights.safetensors"]
    _same_updates(read_lora(tmp_path / "style.safetensors"), read_lora(done.files[0]))


def test_a_bundle_of_ours_reads_back_as_one_concept(tmp_path: Path, components):
    pack = packs.random_pack(components, "rex")
    convert(pack, tmp_path, "kohya")
    layers = cross_attention_layers(components["unet"])
    lora = read_foreign(tmp_path / "rex.safetensors").lora
    _same_updates(pack.lora, lora)
    assert read_as_edlora(tmp_path / "embeddings", layers=layers).concepts[0].tokens == ("<rex1>", "<rex2>")


IDLE = {
    "name of a pack": ("pack", "kohya", {"name": "foo"}, "name; an ED-LoRA keeps"),
    "class word of a pack": ("pack", "edlora", {"class_word": "dog"}, "class word; an ED-LoRA keeps"),
    "all of a pack": (
        "pack",
        "mix-of-show",
        {"name": "a", "class_word": "b", "kind": "pet"},
        "class word, kind, name;",
    ),
    "name of a plain LoRA": ("lora", "kohya", {"name": "foo"}, "name; there is no concept"),
    "class word of words": (
        "words",
        "textual-inversion",
        {"class_word": "dog"},
        "class word; 'textual-inversion' has",
    ),
    "kind in the authors' layout": ("original", "mix-of-show", {"kind": "pet"}, "kind; 'mix-of-show' has no place"),
    "class word in kohya's": ("original", "kohya", {"class_word": "dog"}, "class word; 'kohya' has no place"),
}


@pytest.mark.parametrize("case", IDLE)
def test_what_would_change_nothing_is_refused(tmp_path: Path, case: str):
    source, to, given, said = IDLE[case]
    pack = packs.random_pack(tiny.components(), "rex")
    sources = {
        "pack": lambda: pack,
        "lora": lambda: write_kohya(tmp_path / "style.safetensors", pack.lora),
        "words": lambda: convert(pack, tmp_path / "rex.safetensors", "textual-inversion").files[0],
        "original": lambda: write_original(tmp_path / "rex.pth", pack),
    }
    found = sources[source]()
    with pytest.raises(ConfigurationError, match=f"without effect: {said}"):
        convert(found, tmp_path / "out", to, layers=pack.layers, **given)
    assert not (tmp_path / "out").exists()


def test_a_name_is_given_where_the_format_holds_one(tmp_path: Path):
    pack = packs.random_pack(tiny.components(), "rex")
    path = write_original(tmp_path / "rex.pth", pack)
    convert(path, tmp_path / "out", "kohya", name="foo", layers=pack.layers)
    assert (tmp_path / "out" / "embeddings" / "foo.safetensors").is_file()
