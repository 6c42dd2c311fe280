"""Words whose usual file names are equal: no file is overwritten, and every word comes back with its own vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import packs
import tiny
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import ConfigurationError, EDLoRAFormatError
from diffusers_mixofshow.interop import convert, read_as_edlora
from diffusers_mixofshow.interop.concept_names import distinct_names, plain_name
from diffusers_mixofshow.interop.foreign import read_foreign
from diffusers_mixofshow.interop.lora_files import write_lora
from diffusers_mixofshow.interop.original import write_original
from diffusers_mixofshow.interop.summary import summary_of_foreign


LONG = "x" * 64
EQUAL = {
    "a space and a dash": ("<my cat>", "<my-cat>"),
    "three": ("<my cat>", "<my-cat>", "<my/cat>"),
    "the second's name is taken, too": ("<my cat>", "<my-cat-2>", "<my-cat>"),
    "equal in the first 64 characters": (f"<{LONG}a>", f"<{LONG}b>"),
    "equal but for case": ("<Rex>", "<rex>"),
    "letters of other alphabets": ("<кот>", "<пёс>"),
    "with and without brackets": ("<rex>", "rex"),
    "nothing that a file can be called": ("<*>", "<>"),
}


@pytest.fixture
def source(tmp_path: Path, request) -> Path:
    """A textual inversion of several words, each with vectors of its own, in one file."""
    words = {word: torch.full((2, 768), float(number + 1)) for number, word in enumerate(request.param)}
    save_file(words, tmp_path / "learned_embeds.safetensors")
    return tmp_path / "learned_embeds.safetensors"


@pytest.mark.parametrize("source", EQUAL.values(), ids=EQUAL, indirect=True)
def test_every_word_has_a_file_of_its_own(tmp_path: Path, source: Path):
    words = load_file(source)
    done = convert(source, tmp_path / "out", "textual-inversion")
    assert len({file.name.lower() for file in done.files}) == len(words)
    assert {word: rows[0, 0].item() for file in done.files for word, rows in load_file(file).items()} == {
        word: rows[0, 0].item() for word, rows in words.items()
    }
    usual = [plain_name(word) for word in words]
    renamed = [file.stem for file, name in zip(done.files, usual, strict=True) if file.stem != name]
    assert renamed
    assert [sentence for name, sentence in zip(renamed, done.lost, strict=True) if f"called {name}," in sentence] == [
        *done.lost
    ]


@pytest.mark.parametrize("source", EQUAL.values(), ids=EQUAL, indirect=True)
def test_words_become_concepts_of_their_own(source: Path):
    edlora = read_as_edlora(source, base_model="someone/base")
    assert len(edlora.concepts) == len(load_file(source))
    assert {rows[0, 0].item() for rows in edlora.embeddings.values()} == {
        rows[0, 0].item() for rows in load_file(source).values()
    }


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_embeddings_beside_a_lora_stay_apart_and_come_back(tmp_path: Path, to: str):
    pack = packs.random_pack(tiny.components(), "Rex", "rex")
    done = convert(pack, tmp_path / "out", to)
    assert [file.name for file in done.files[1:-1]] == ["Rex.safetensors", "rex-2.safetensors"]
    assert 'embeddings/rex-2.safetensors", token="<rex-2>"' in done.files[-1].read_text()
    found = read_foreign(done.files[0])
    assert list(found.vectors) == ["<Rex>", "<rex>"]
    assert not [problem for problem in summary_of_foreign(found)["problems"] if "embeddings" in problem]
    back = read_as_edlora(done.files[0], layers=pack.layers)
    assert [concept.placeholder for concept in back.concepts] == ["<Rex>", "<rex>"]


def test_a_concept_keeps_the_name_that_windows_takes_for_no_file(tmp_path: Path):
    pack = packs.random_pack(tiny.components(), "con", "nul.x")
    assert distinct_names(["<con>", "con", "<aux>"]) == {"<con>": "con_", "con": "con_-2", "<aux>": "aux_"}
    assert plain_name("<con>") == "con"
    done = convert(pack, tmp_path / "out", "kohya")
    assert [file.name for file in done.files[1:-1]] == ["con_.safetensors", "nul_.x.safetensors"]
    back = read_as_edlora(done.files[0], layers=pack.layers)
    assert [concept.placeholder for concept in back.concepts] == ["<con>", "<nul.x>"]


def test_one_missing_of_two_alike_is_told(tmp_path: Path):
    pack = packs.random_pack(tiny.components(), "Rex", "rex")
    done = convert(pack, tmp_path / "out", "kohya")
    done.files[1].unlink()
    (problem,) = [one for one in summary_of_foreign(read_foreign(done.files[0]))["problems"] if "embeddings" in one]
    assert "<Rex>" in problem
    assert "<rex>" not in problem


def test_a_name_is_kept_where_it_is_nobody_elses(tmp_path: Path):
    pack = packs.random_pack(tiny.components(), "rex", "kit")
    done = convert(pack, tmp_path / "out", "textual-inversion")
    assert [file.name for file in done.files] == ["rex.safetensors", "kit.safetensors"]
    assert not [sentence for sentence in done.lost if "called" in sentence]
    assert distinct_names([f"<{LONG}a>", f"<{LONG}b>"])[f"<{LONG}b>"] == f"{'x' * 62}-2"


def test_a_lora_without_a_word_is_called_after_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    lora = packs.random_pack(tiny.components(), "rex").lora
    write_lora(tmp_path / "x.safetensors", lora)
    assert [file.name for file in convert("../x.safetensors", ".", "kohya").files] == ["here.safetensors"]


def save_words(folder: Path, **words: str) -> Path:
    folder.mkdir()
    for number, (file, word) in enumerate(words.items()):
        save_file({word: torch.full((1, 768), float(number))}, folder / f"{file.replace('_', '-')}.safetensors")
    return folder


def test_words_whose_numbered_tokens_would_be_another_word_are_read(tmp_path: Path):
    found = read_as_edlora(save_words(tmp_path / "words", dog="<dog>", dog1="<dog1>"), base_model="x")
    tokens = {concept.placeholder: concept.tokens for concept in found.concepts}
    assert tokens == {"<dog>": ("<dog_1>",), "<dog1>": ("<dog11>",)}


def test_a_word_in_two_files_is_refused_and_steps_beside_the_final_file_are_left_out(tmp_path: Path):
    steps = {"emb-steps-500": "<dog>", "emb-steps-1000": "<dog>"}
    with pytest.raises(EDLoRAFormatError, match=r"<dog> in 2 \(emb-steps-1000\.safetensors, emb-steps-500"):
        read_foreign(save_words(tmp_path / "steps", **steps))
    found = read_foreign(save_words(tmp_path / "done", **steps, emb="<dog>"))
    assert [file.name for file in found.files] == ["emb.safetensors"]
    assert found.vectors["<dog>"]["clip_l"].unique().tolist() == [2.0]


def test_an_unknown_format_is_refused_with_those_that_there_are(tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"Got the format 'kohy'; expected one of edlora, .* mean kohya\?"):
        convert(save_words(tmp_path / "words", dog="<dog>"), tmp_path / "out", "kohy")


@pytest.mark.parametrize("block", ["mid_block.attentions.3", "down_blocks.x.attentions.0", "up_blocks.foo"])
def test_a_block_that_sdxl_does_not_have_is_refused_in_kohyas_names(tmp_path: Path, block: str):
    site = f"unet.{block}.transformer_blocks.0.attn2.to_k"
    update = LowRank(down=torch.ones(4, 2048), up=torch.ones(320, 4), alpha=4.0)
    write_lora(tmp_path / "x.safetensors", {site: update})
    with pytest.raises(EDLoRAFormatError, match=f"The layer {site} has no name in kohya's files"):
        convert(tmp_path / "x.safetensors", tmp_path / "out", "kohya")
    assert not any((tmp_path / "out").glob("*.safetensors"))


def test_class_words_are_not_taken_for_the_authors_layout_which_has_no_place_for_them(tmp_path: Path):
    pack = packs.random_pack(tiny.components(), "rex")
    write_original(tmp_path / "rex.pth", pack)
    with pytest.raises(ConfigurationError, match="without effect: class word; 'mix-of-show' has no place"):
        convert(tmp_path / "rex.pth", tmp_path / "out", "mix-of-show", class_word="dog", base_model="a/b")
