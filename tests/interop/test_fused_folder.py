"""A model that the authors' code fused loads with its concepts and draws what their binding of prompts draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

import tiny
from diffusers_mixofshow import EDLoRA, MixOfShowImg2ImgPipeline, MixOfShowPipeline, Region
from diffusers_mixofshow.errors import ConfigurationError, EDLoRAFormatError, OverwriteError
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.interop.fused_folder import CONCEPTS_NAME


TOKENS = ("<potter1>", "<potter2>", "<thanos1>", "<thanos2>")
Entries = dict[str, dict[str, list[Any]]]


def write_fused(folder: Path, tokens: tuple[str, ...] = TOKENS) -> Entries:
    """A fused model as the authors' program leaves it: words <new0>, ... with rows of their own, and their list."""
    pipe = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    layers = len(cross_attention_layers(pipe.unet))
    entries: Entries = {}
    for number, token in enumerate(tokens):
        names = [f"<new{number * layers + layer}>" for layer in range(layers)]
        pipe.tokenizer.add_tokens(names)
        entries[token] = {
            "concept_token_ids": pipe.tokenizer.convert_tokens_to_ids(names),
            "concept_token_names": names,
        }
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    table = pipe.text_encoder.get_input_embeddings().weight.data
    generator = torch.Generator().manual_seed(1)
    for entry in entries.values():
        table[entry["concept_token_ids"]] = torch.randn(layers, table.shape[1], generator=generator)
    pipe.save_pretrained(folder)
    (folder / CONCEPTS_NAME).write_text(json.dumps(entries))
    return entries


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composed") / "combined_model_base"
    write_fused(folder)
    return folder


@pytest.fixture
def pipe(fused: Path) -> MixOfShowPipeline:
    return load(fused)


def load(folder: Path | str, **options: Any) -> MixOfShowPipeline:
    pipeline = MixOfShowPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipe: Any, prompt: str | None = None, **settings: Any) -> torch.Tensor:
    usual = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **usual | settings).images


def bound(pipe: Any, prompt: str, entries: Entries) -> torch.Tensor:
    """The authors' binding: one text for each layer, its own words put in; shape (1, layers * 77, dim)."""
    texts = []
    for layer in range(len(cross_attention_layers(pipe.unet))):
        text = prompt
        for token, entry in entries.items():
            text = text.replace(token, entry["concept_token_names"][layer])
        texts.append(text)
    ids = pipe.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0].flatten(0, 1)[None]


PROMPTS = (
    "<potter1> <potter2>",
    "a <potter1> <potter2> near the castle, 4K, high quality",
    "photo of <thanos1> <thanos2>, and a <potter1> <potter2>.",
    "<thanos2> alone",
    "a dog " * 30 + "<potter1> <potter2>",
)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_it_draws_what_the_authors_binding_draws(pipe: MixOfShowPipeline, fused: Path, prompt: str) -> None:
    entries = json.loads((fused / CONCEPTS_NAME).read_text())
    texts = {"prompt_embeds": bound(pipe, prompt, entries), "negative_prompt_embeds": bound(pipe, "blurry", entries)}
    expected = drawn(pipe, **texts)
    torch.testing.assert_close(drawn(pipe, prompt, negative_prompt="blurry"), expected, rtol=1e-4, atol=1e-4)


def test_placeholders_stand_for_the_tokens_also_in_regions(pipe: MixOfShowPipeline) -> None:
    assert {name: concept.tokens for name, concept in pipe.concepts.items()} == {
        "<potter>": ("<potter1>", "<potter2>"),
        "<thanos>": ("<thanos1>", "<thanos2>"),
    }
    assert torch.equal(drawn(pipe, "a <potter> here"), drawn(pipe, "a <potter1> <potter2> here"))

    def regions(left: str, right: str) -> list[Region]:
        return [Region(left, box=(0, 0, 0.5, 1)), Region(right, box=(0.5, 0, 1, 1))]

    found = drawn(pipe, "two people", regions=regions("a <potter>", "a <thanos>"))
    assert torch.equal(
        found, drawn(pipe, "two people", regions=regions("a <potter1> <potter2>", "a <thanos1> <thanos2>"))
    )
    assert not torch.allclose(found, drawn(pipe, "two people", regions=regions("a <thanos>", "a <potter>")))


def test_without_a_concept_it_is_its_parent(pipe: MixOfShowPipeline, fused: Path) -> None:
    parent = StableDiffusionPipeline.from_pretrained(fused)
    assert torch.equal(drawn(pipe, "a dog"), drawn(parent, "a dog"))


def _saved(pipe: MixOfShowPipeline, folder: Path) -> MixOfShowPipeline:
    pipe.save_pretrained(folder)
    return load(folder)


def _saved_from_another(pipe: MixOfShowPipeline, folder: Path) -> MixOfShowPipeline:
    MixOfShowImg2ImgPipeline.from_pipe(pipe).save_pretrained(save_directory=folder)
    return load(folder)


AGAIN: dict[str, Callable[[MixOfShowPipeline, Path], MixOfShowPipeline]] = {
    "saved": _saved,
    "saved twice": lambda pipe, folder: _saved(_saved(pipe, folder / "once"), folder / "twice"),
    "saved over itself": lambda pipe, folder: _saved(_saved(pipe, folder), folder),
    "saved by a pipeline made of it": _saved_from_another,
    "made of it": lambda pipe, folder: MixOfShowPipeline.from_pipe(pipe),
}


@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN)
def test_its_concepts_go_with_it(
    pipe: MixOfShowPipeline, tmp_path: Path, again: Callable[[MixOfShowPipeline, Path], MixOfShowPipeline]
) -> None:
    expected = drawn(pipe, "a <potter> and a <thanos>")
    other = again(pipe, tmp_path / "saved")
    assert list(other.concepts) == ["<potter>", "<thanos>"]
    assert torch.equal(drawn(other, "a <potter> and a <thanos>"), expected)


def test_a_merged_pipeline_keeps_its_concepts_when_it_is_saved_again(tmp_path: Path) -> None:
    import packs

    base = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    base.save_pretrained(tmp_path / "base")
    pack = packs.random_pack(base.components, "rex", ranks=(2,))
    named = EDLoRA(**{**vars(pack), "base_model": str(tmp_path / "base")})
    named.save_pretrained(tmp_path / "merged", merged=True)
    pipe = load(tmp_path / "merged")
    expected = drawn(pipe, "a <rex>")
    pipe.load_edlora(packs.random_pack(base.components, "kit", ranks=(2,), seed=3))
    other = _saved(pipe, tmp_path / "again")
    assert list(other.concepts) == ["<rex>"]  # <kit> has a file of its own
    assert torch.equal(drawn(other, "a <rex>"), expected)
    pipe.unload_edlora("<rex>")
    assert not _saved(pipe, tmp_path / "without").concepts


def test_it_loads_in_half_precision_and_by_a_relative_path(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(fused, dtype=torch.bfloat16)
    assert {rows.dtype for edlora in pipe._edloras.values() for rows in edlora.embeddings.values()} == {torch.bfloat16}
    monkeypatch.chdir(fused.parent)
    assert list(load("combined_model_base").concepts) == ["<potter>", "<thanos>"]


def test_a_concept_of_one_token_and_other_names(tmp_path: Path) -> None:
    write_fused(tmp_path, ("<sks>", "<My-Cat_1>", "<My-Cat_2>"))
    pipe = load(tmp_path)
    assert {name: concept.tokens for name, concept in pipe.concepts.items()} == {
        "<sks>": ("<sks1>",),
        "<My-Cat>": ("<My-Cat_1>", "<My-Cat_2>"),
    }


def test_no_concepts_are_none(tmp_path: Path) -> None:
    write_fused(tmp_path, ())
    assert not load(tmp_path).concepts


def _changed(change: Callable[[Entries], Any]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        entries = json.loads(file.read_text())
        file.write_text(json.dumps(change(entries) or entries))

    return write


def _of_first(**values: Any) -> Callable[[Path], None]:
    return _changed(lambda entries: entries["<potter1>"].update(values))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:40]), "cannot be read as JSON"),
    "no text": (lambda file: file.write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "deep": (lambda file: file.write_text("[" * 100_000), "cannot be read as JSON"),
    "endless": (lambda file: file.write_bytes(b" " * (9 * 2**20)), "too large for a list of concepts"),
    "a list": (lambda file: file.write_text("[1]"), "holds a list; expected an entry for each concept"),
    "an entry that is no dict": (_changed(lambda entries: entries | {"<x>": 3}), "<x> has no list"),
    "no words": (_of_first(concept_token_names=[]), "<potter1> has no list 'concept_token_names'"),
    "words that are no texts": (_of_first(concept_token_names=[1, 2]), "<potter1> has no list"),
    "unknown words": (_of_first(concept_token_names=["<x1>", "<x2>", "<x3>", "<x4>"]), "does not know: 4"),
    "other ids": (_of_first(concept_token_ids=[1, 2, 3, 4]), "ids of <potter1> are not those"),
    "ids that are no numbers": (_of_first(concept_token_ids="none"), "ids of <potter1>"),
    "too few words": (
        _of_first(concept_token_names=["<new0>"], concept_token_ids=None),
        r"not one word for each of the U-Net's 4 cross-attention layers: 1 \(<potter1> 1\)",
    ),
    "several": (
        _changed(lambda entries: {**entries, "<a>": 1, "<b>": {"concept_token_names": ["<y>"]}}),
        "<a> has no list.*<b>.*does not know",
    ),
    "for a terminal": (_changed(lambda entries: {"<\x1b[2J>": 1}), r"\\x1b"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_list_is_one_clear_error(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_fused(tmp_path)
    damage(tmp_path / CONCEPTS_NAME)
    with pytest.raises(EDLoRAFormatError, match=message) as told:
        load(tmp_path)
    assert CONCEPTS_NAME in str(told.value)
    assert "\x1b" not in str(told.value)


@pytest.mark.parametrize("beyond", [1, len(TOKENS) * 4], ids=["the last word alone", "all of them"])
def test_words_beyond_the_text_encoders_table_are_told(tmp_path: Path, beyond: int) -> None:
    """The tokenizer knows every word, and the table was saved before it was enlarged for the last of them."""
    write_fused(tmp_path)
    encoder = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    rows = encoder.get_input_embeddings().num_embeddings - beyond
    encoder.resize_token_embeddings(rows)
    encoder.save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(EDLoRAFormatError, match=f"words of <thanos2> have no row .*, which has {rows}"):
        load(tmp_path)


def test_it_is_a_pipeline_and_no_concept(pipe: MixOfShowPipeline, fused: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"complete pipeline.*MixOfShowPipeline\.from_pretrained\("):
        pipe.load_edlora(fused)


def test_it_comes_from_the_hub_with_its_concepts(fused: Path, loopback_hub: Any) -> None:
    from diffusers_mixofshow.edlora.hub import create

    create("me/composed", token=loopback_hub.token, private=False, revision=None)
    content = {path.relative_to(fused).as_posix(): path.read_bytes() for path in fused.rglob("*") if path.is_file()}
    loopback_hub.repositories["me/composed"].commit("main", "files", content)
    assert list(load("me/composed").concepts) == ["<potter>", "<thanos>"]


def test_the_command_line_samples_it(fused: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from diffusers_mixofshow.cli import app

    arguments = ["--base", str(fused), "--prompt", "a <potter>", "--steps", "1", "--output", str(tmp_path / "a.png")]
    result = CliRunner().invoke(app, ["sample", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    assert (tmp_path / "a.png").exists()


def _another_pack(folder: Path) -> None:
    import packs

    packs.random_pack(tiny.components(), "rex", ranks=(2,)).save_pretrained(folder)


def _another_fused_pipeline(folder: Path) -> None:
    write_fused(folder / "other", ("<kit1>", "<kit2>"))
    load(folder / "other").save_pretrained(folder)


def _a_broken_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "edlora.safetensors").write_bytes(b"half of a pack")


OTHERS = {"a pack": _another_pack, "a pipeline": _another_fused_pipeline, "a broken file": _a_broken_file}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("occupy", OTHERS.values(), ids=OTHERS)
def test_saving_it_destroys_no_other_pack(
    pipe: MixOfShowPipeline, tmp_path: Path, occupy: Callable[[Path], None], named: bool
) -> None:
    folder = tmp_path / "mine"
    occupy(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(OverwriteError, match=r"edlora\.safetensors.*<potter>, <thanos>.*another folder"):
        pipe.save_pretrained(save_directory=folder) if named else pipe.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_once_its_concepts_are_unloaded_a_pack_in_the_folder_may_stay(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    _another_pack(tmp_path)
    before = (tmp_path / "edlora.safetensors").read_bytes()
    pipe.unload_edlora()
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "edlora.safetensors").read_bytes() == before
