"""Any file of another program, read as an ED-LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import packs
import tiny
from diffusers_mixofshow import EDLoRA
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.families.sdxl import SDXL
from diffusers_mixofshow.families.stable_diffusion import SD1, SD2
from diffusers_mixofshow.interop.foreign import Kind, read_as_edlora, read_foreign
from interop import foreign as files


XL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}


@pytest.mark.parametrize(("family", "config"), [(SD1, {"cross_attention_dim": 768}), (SDXL, XL_UNET)])
def test_families_name_their_unets_layers_in_order(family, config):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert family.layers == cross_attention_layers(unet)


@pytest.mark.parametrize("research", [False, True])
def test_both_layouts_of_the_authors_checkpoints(tmp_path: Path, research: bool):
    params = files.original(tmp_path / "edlora.pth", research=research)
    rex = read_as_edlora(tmp_path / "edlora.pth", class_word="dog", kind="pet", base_model="someone/base")
    (concept,) = rex.concepts
    assert (concept.placeholder, concept.tokens, concept.class_word) == ("<rex>", ("<rex1>", "<rex2>"), "dog")
    assert rex.layers == SD1.layers
    embeddings = next(iter(params.values()))
    assert all(torch.equal(rex.embeddings[token], rows) for token, rows in embeddings.items())
    assert sorted(rex.lora) == [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0",
    ]
    assert {update.scaling for update in rex.lora.values()} == {1.0}
    halves = [half for update in rex.lora.values() for half in (update.down, update.up)]
    written = [half for part in ("text_encoder", "unet") for half in params[part].values()]
    assert all(torch.equal(one, other) for one, other in zip(halves, written, strict=True))
    rex.save_pretrained(tmp_path / "rex")


def test_several_concepts_in_one_checkpoint_and_names_that_prompts_cannot_have(tmp_path: Path):
    files.original(tmp_path / "x.pth", tokens=("<rex1>", "<rex2>", "<kit1>", "<kit2>", "my cat"))
    concepts = read_as_edlora(tmp_path / "x.pth").concepts
    assert [(one.placeholder, one.tokens) for one in concepts] == [
        ("<rex>", ("<rex1>", "<rex2>")),
        ("<kit>", ("<kit1>", "<kit2>")),
        ("<my-cat>", ("<my-cat1>",)),
    ]
    renamed = read_as_edlora(tmp_path / "x.pth", name="all").concepts
    assert [one.tokens for one in renamed] == [tuple(f"<all{number}>" for number in range(1, 6))]


def test_bundled_embeddings_are_a_concept(tmp_path: Path):
    tensors = files.kohya(tmp_path / "rex.safetensors", bundled=True)
    rex = read_as_edlora(tmp_path / "rex.safetensors")
    assert rex.concepts[0].tokens == ("<rex1>", "<rex2>")
    vectors = tensors["bundle_emb.rex.string_to_param.*"]
    assert rex.embeddings["<rex1>"].shape == (16, 768)
    assert torch.equal(rex.embeddings["<rex2>"], vectors[1].expand(16, -1))
    assert sorted(update.scaling for update in rex.lora.values()) == [0.25, 1.0]


VECTORS = torch.randn(2, 768, generator=torch.Generator().manual_seed(3))


def _a1111(path: Path) -> None:
    parameter = torch.nn.Parameter(VECTORS)
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": parameter}, "name": "old", "step": 10}
    torch.save(content | {"sd_checkpoint": None, "sd_checkpoint_name": None}, path)


@pytest.mark.parametrize(
    ("file", "write", "word"),
    [
        ("rex.pt", _a1111, "<rex>"),
        ("rex.safetensors", lambda path: save_file({"emb_params": VECTORS}, path), "<rex>"),
        ("learned_embeds.safetensors", lambda path: save_file({"<rex>": VECTORS}, path), "<rex>"),
        ("learned_embeds.bin", lambda path: torch.save({"<rex>": VECTORS}, path), "<rex>"),
        ("rex_emb.safetensors", lambda path: save_file({"clip_l": VECTORS}, path), "<rex>"),
        ("rex_emb.safetensors", lambda path: save_file({"text_encoders_0": VECTORS}, path), "<rex>"),
    ],
)
def test_every_spelling_of_a_textual_inversion(tmp_path: Path, file: str, write, word: str):
    write(tmp_path / file)
    found = read_foreign(tmp_path / file)
    assert found.kind is Kind.TEXTUAL_INVERSION
    assert found.made_for is SD1
    edlora = read_as_edlora(tmp_path / file)
    assert [concept.placeholder for concept in edlora.concepts] == [word]
    assert torch.equal(edlora.embeddings["<rex2>"], VECTORS[1].expand(16, -1))
    assert not edlora.lora


def test_a_word_that_ends_in_a_number_stays_one_word(tmp_path: Path):
    save_file({"<rex2>": VECTORS[:1], "<rex3>": VECTORS[0].clone()}, tmp_path / "learned_embeds.safetensors")
    edlora = read_as_edlora(tmp_path / "learned_embeds.safetensors")
    assert {concept.placeholder: concept.tokens for concept in edlora.concepts} == {
        "<rex2>": ("<rex21>",),
        "<rex3>": ("<rex31>",),
    }


def test_a_folder_of_diffusers_advanced_training(tmp_path: Path):
    down, up = torch.randn(2, 768), torch.randn(1280, 2)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{name}.lora.down.weight": down, f"{name}.lora.up.weight": up}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    save_file({"clip_l": VECTORS}, tmp_path / "rex_emb.safetensors")
    found = read_foreign(tmp_path)
    assert found.kind is Kind.LORA_AND_EMBEDDINGS
    rex = read_as_edlora(tmp_path, name="buddy", class_word="dog")
    assert rex.concepts[0].tokens == ("<buddy1>", "<buddy2>")
    assert torch.equal(rex.lora[name].up, up)
    assert rex.layers == SD1.layers


def test_pefts_settings_beside_its_file(tmp_path: Path):
    layer = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    halves = {f"{layer}.lora_A.weight": torch.ones(4, 6), f"{layer}.lora_B.weight": torch.ones(8, 4)}
    save_file(halves, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16, "r": 4}')
    (update,) = read_foreign(tmp_path).lora.values()
    assert update.scaling == 4


def test_embeddings_for_two_text_encoders_are_the_same_for_all_groups_and_the_vector(tmp_path: Path):
    second = torch.randn(2, 1280, generator=torch.Generator().manual_seed(1))
    save_file({"clip_l": VECTORS, "clip_g": second}, tmp_path / "rex.safetensors")
    assert read_foreign(tmp_path / "rex.safetensors").made_for is SDXL
    rex = read_as_edlora(tmp_path / "rex.safetensors", class_word="dog")
    assert len(rex.layers) == 11
    assert rex.concepts[0].tokens == ("<rex1>", "<rex2>")
    for number, token in enumerate(rex.concepts[0].tokens):
        assert torch.equal(rex.embeddings[token], VECTORS[number].expand(11, -1))
        assert torch.equal(rex.embeddings[f"text_encoder_2.{token}"], second[number].expand(11, -1))
        assert torch.equal(rex.embeddings[f"pooled.{token}"], second[number : number + 1])
    assert len(rex.embeddings) == 6


@pytest.mark.parametrize("vectors", [{"clip_g": (2, 1280)}, {"clip_l": (1, 768), "clip_g": (2, 1280)}], ids=str)
def test_words_that_two_text_encoders_do_not_read_alike_are_refused(
    tmp_path: Path, vectors: dict[str, tuple[int, int]]
):
    save_file({name: torch.ones(*shape) for name, shape in vectors.items()}, tmp_path / "rex.safetensors")
    with pytest.raises(EDLoRAFormatError, match=r"not as many vectors .*<?rex>? \(\d clip_l, 2 clip_g\)"):
        read_as_edlora(tmp_path / "rex.safetensors")


def test_widths_tell_stable_diffusion_2(tmp_path: Path):
    save_file({"<rex>": torch.ones(1024)}, tmp_path / "rex.safetensors")
    assert read_foreign(tmp_path / "rex.safetensors").made_for is SD2


def test_another_base_needs_its_layers(tmp_path: Path):
    save_file({"<rex>": torch.ones(1, 32)}, tmp_path / "rex.safetensors")
    with pytest.raises(EDLoRAFormatError, match="which no known base has"):
        read_as_edlora(tmp_path / "rex.safetensors")
    components = tiny.components()
    rex = read_as_edlora(tmp_path / "rex.safetensors", layers=cross_attention_layers(components["unet"]))
    rex.check_fits(components)


def _of_words(rows):
    return {"params": {"new_concept_embedding": {"<rex>": rows}}}


class _Harmful:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"params": {"new_concept_embedding": {"<rex>": _Harmful()}}}, "weights_only=True"),
        ({"params": {"unet": {"conv_in.weight": torch.ones(2, 2)}}}, "full weights"),
        ({"params": {"unet": {}, "text_encoder": {}, "new_concept_embedding": {}}}, "neither embeddings nor"),
        (_of_words(torch.ones(2, 2, 2)), r"not of shape \(layers, dim\): 1 \(<rex>"),
        (_of_words(torch.ones(0, 2)), r"not of shape \(layers, dim\): 1 \(<rex>"),
        (_of_words(torch.ones(2, 0)), r"not of shape \(layers, dim\): 1 \(<rex>"),
        ({"params": {"unet": 3, "optimizer": {}}}, "unknown entries"),
        ({"<rex>": torch.ones(1).expand(10**6, 768)}, "larger than the file"),
        ({"string_to_param": {"a": torch.ones(2, 768), "b": torch.ones(2, 768)}}, "none of its tensors belongs"),
        ({"<rex>": torch.full((768,), torch.inf)}, r"not finite: 1 \(<rex> clip_l\)"),
        ({"params": {"unet": {"to_q.lora_down.weight": torch.tensor(1.0)}}}, "only one of the two matrices"),
        ([1, 2, 3], "none of its tensors belongs"),
        ("text", "none of its tensors belongs"),
    ],
)
def test_pickles_that_are_something_else(tmp_path: Path, content, message: str, capsys):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(EDLoRAFormatError, match=message):
        read_as_edlora(tmp_path / "x.pth")
    assert "must never run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\x80\x02garbage", b"PK\x03\x04"])
@pytest.mark.parametrize("file", ["x.pth", "x.safetensors"])
def test_damaged_files(tmp_path: Path, content: bytes, file: str):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(EDLoRAFormatError, match="cannot be read"):
        read_as_edlora(tmp_path / file)


def test_nothing_there(tmp_path: Path):
    for path in (tmp_path / "none.pth", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(EDLoRANotFoundError):
            read_as_edlora(path)


@pytest.mark.parametrize("file", [".", "edlora.safetensors", "renamed.safetensors"])
def test_a_pack_of_ours_is_told_as_that(tmp_path: Path, file: str, pack: EDLoRA):
    pack.save_pretrained(tmp_path)
    (tmp_path / "renamed.safetensors").write_bytes((tmp_path / "edlora.safetensors").read_bytes())
    place = tmp_path / file
    for read in (read_as_edlora, read_foreign):
        with pytest.raises(EDLoRAFormatError) as raised:
            read(place)
        told = f"{place} is an ED-LoRA of this package. Read it: EDLoRA.from_pretrained({str(place)!r})."
        assert str(raised.value) == told
    packs.assert_same_pack(EDLoRA.from_pretrained(place), pack)


def test_several_loras_in_a_folder(tmp_path: Path):
    for name in ("one", "two"):
        files.kohya(tmp_path / f"{name}.safetensors")
    with pytest.raises(EDLoRAFormatError, match="holds several"):
        read_as_edlora(tmp_path)


def test_a_checkpoint_is_no_lora_and_its_names_tell(tmp_path: Path):
    names = [f"model.diffusion_model.input_blocks.{number}.0.weight" for number in range(70)]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(EDLoRAFormatError, match="tensors of no known meaning: 70"):
        read_as_edlora(tmp_path / "model.safetensors")


def test_eight_bit_floats_become_numbers_that_can_be_computed_with(tmp_path: Path):
    vectors = VECTORS.to(torch.float8_e4m3fn)
    save_file({"<rex>": vectors}, tmp_path / "rex.safetensors")
    rex = read_as_edlora(tmp_path / "rex.safetensors")
    assert torch.equal(rex.embeddings["<rex1>"][0], vectors[0].float())
