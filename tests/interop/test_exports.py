"""What was exported for other programs is read back whole, with the embeddings that lie beside it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

import packs
import tiny
from diffusers_mixofshow import toyland
from diffusers_mixofshow.base_models import location_of
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.families.stable_diffusion import EMBEDDED
from diffusers_mixofshow.fusion import GradientFuser, LoRASource
from diffusers_mixofshow.interop import convert, read_as_edlora
from diffusers_mixofshow.interop.foreign import read_foreign
from diffusers_mixofshow.interop.summary import summary_of_foreign
from diffusers_mixofshow.interop.textual_inversion import mean_over_layers, mean_vectors
from diffusers_mixofshow.pipelines import MixOfShowPipeline


def toyland_pack(name, components):
    pack = packs.random_pack(components, name, alphas=(4.0, 2.0))
    embeddings = {token: torch.cat([rows] * 4, dim=1) for token, rows in pack.embeddings.items()}
    return replace(pack, embeddings=embeddings, base_model="toyland")


@pytest.fixture(scope="module")
def rex():
    components = toyland.load_pipeline().components
    return toyland_pack("rex", components)


def lora_file(folder):
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("given", [lambda folder: folder, lora_file], ids=["folder", "file"])
def test_an_export_comes_back_with_its_embeddings(rex, tmp_path, to, given):
    convert(rex, tmp_path / "out", to)
    back = read_as_edlora(given(tmp_path / "out"), class_word="dog")
    assert [(c.placeholder, c.tokens) for c in back.concepts] == [(c.placeholder, c.tokens) for c in rex.concepts]
    assert back.layers == rex.layers
    assert back.lora.keys() == rex.lora.keys()
    for site, update in rex.lora.items():
        assert torch.equal(back.lora[site].down, update.down)
        assert torch.equal(back.lora[site].scaling * back.lora[site].up, update.scaling * update.up)
    for token, rows in rex.embeddings.items():
        assert torch.equal(back.embeddings[token], mean_over_layers(rows).expand_as(rows))


def test_the_base_of_toylands_layers_is_known(rex, tmp_path):
    convert(rex, tmp_path / "out", "kohya")
    found = summary_of_foreign(read_foreign(lora_file(tmp_path / "out")))
    assert "Toyland" in found["architecture"]
    assert found["problems"] == []
    convert(tmp_path / "out", tmp_path / "back", "edlora", class_word="dog")
    assert EDLoRA.from_pretrained(tmp_path / "back").base_model == "toyland"


def test_the_table_of_toylands_layers_is_its_u_nets():
    assert cross_attention_layers(toyland.load_pipeline().unet) == EMBEDDED.layers


def test_exports_side_by_side_keep_their_own_embeddings(rex, tmp_path):
    other = toyland_pack("bobo", toyland.load_pipeline().components)
    for pack in (rex, other):
        convert(pack, tmp_path / f"{pack.concepts[0].name}.safetensors", "kohya")
    assert [c.placeholder for c in read_as_edlora(tmp_path / "bobo.safetensors").concepts] == ["<bobo>"]


def test_an_export_that_was_moved_alone_says_what_is_missing(rex, tmp_path):
    convert(rex, tmp_path / "out", "kohya")
    alone = lora_file(tmp_path / "out").rename(tmp_path / "rex.safetensors")
    (problem,) = summary_of_foreign(read_foreign(alone))["problems"]
    assert "embeddings/" in problem
    assert "<rex>" in problem


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_an_export_without_its_embeddings_is_told_once_wherever_it_is_read(rex, tmp_path, to):
    files = convert(rex, tmp_path / "out", to).files
    (words,) = [file for file in files if file.parent.name == "embeddings"]
    words.unlink()
    pipe = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)
    doors = {
        "load_edlora": lambda: pipe.load_edlora(files[0]),
        "convert": lambda: convert(files[0], tmp_path / "again", "kohya"),
        "inspect": lambda: read_foreign(files[0]),
        "the folder": lambda: read_foreign(tmp_path / "out"),
        "fuse": lambda: GradientFuser(pipe).fuse([LoRASource(files[0], ["a dog"])], method="average"),
    }
    for door, read in doors.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read()
        told = [str(one.message) for one in caught if "embeddings/ beside it: 1 (<rex>)" in str(one.message)]
        assert len(told) == 1, door


def test_names_in_the_metadata_lead_nowhere_else(rex, tmp_path):
    """Words of a stranger's file become plain names in the folder beside it."""
    from diffusers_mixofshow.interop.lora_files import companions_metadata, write_kohya

    outside = convert(rex, tmp_path / "secret.safetensors", "textual-inversion").files[0]
    path = write_kohya(tmp_path / "in" / "x.safetensors", rex.lora, companions_metadata([f"../../{outside.stem}"]))
    (tmp_path / "in" / "embeddings").mkdir()
    assert read_foreign(path).vectors == {}


def test_convert_tells_what_is_lost_before_it_writes(tmp_path: Path):
    told = []

    def stop(lost: Sequence[str]) -> None:
        told.extend(lost)
        raise KeyboardInterrupt

    for to in ("kohya", "diffusers", "textual-inversion"):
        with pytest.raises(KeyboardInterrupt):
            convert(packs.random_pack(tiny.components(), "rex"), tmp_path / "out", to, before_writing=stop)
    assert "Most of the identity" in told[0]
    assert not (tmp_path / "out").exists()


def test_how_to_use_sends_nobody_to_programs_that_load_nothing(tmp_path: Path):
    texts = {}
    for to in ("kohya", "diffusers"):
        texts[to] = convert(packs.random_pack(tiny.components(), "rex"), tmp_path / to, to).files[-1].read_text()
        assert 'pipe.load_textual_inversion("embeddings/rex.safetensors", token="<rex>")' in texts[to]
        assert "pipe.load_lora_weights(" in texts[to]
    assert "<lora:rex:1>" in texts["kohya"]
    assert "models/loras" in texts["kohya"]
    assert "models/" not in texts["diffusers"]
    assert "Not for A1111 and ComfyUI" in texts["diffusers"]
    assert "--to kohya" in texts["diffusers"]


@pytest.mark.parametrize("base", ["toyland", "toyland-xl"])
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_the_lines_of_how_to_use_load_all_of_it_in_stock_diffusers(tmp_path: Path, monkeypatch, base: str, to: str):
    pipe = diffusers.DiffusionPipeline.from_pretrained(location_of(base))
    pack = packs.random_pack(pipe.components, "rex", "bobo", base_model=base)
    text = convert(pack, tmp_path, to).files[-1].read_text()
    lines = [line.strip() for line in text.partition("diffusers:\n")[2].splitlines() if line.startswith("    ")]
    assert lines[0].startswith("pipe.load_lora_weights(")
    assert lines.pop() == 'pipe("photo of a <rex>")'
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), {"pipe": pipe})
    for word, vectors in mean_vectors(pack).items():
        for number, encoder in {"": "clip_l", "_2": "clip_g"}.items():
            if encoder in vectors:
                tokenizer, model = (pipe.components[f"{part}{number}"] for part in ("tokenizer", "text_encoder"))
                tokens = tokenizer.convert_tokens_to_ids([word, f"{word}_1"])
                assert torch.equal(model.get_input_embeddings().weight[tokens], vectors[encoder].to(model.dtype))
