"""Packs measured side by side, on Toyland and by a CLIP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from diffusers_mixofshow import toyland
from diffusers_mixofshow.concepts import KINDS, Concept
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.evaluation.clip_judge import ClipJudge
from diffusers_mixofshow.evaluation.packs import (
    CLASS_WORD,
    MEAN,
    Reference,
    evaluate_packs,
    picture_count,
    record_rows,
)
from diffusers_mixofshow.evaluation.prompts import evaluation_prompts
from diffusers_mixofshow.evaluation.sampling import Sampling
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.fusion.prompts import RECORDING_PROMPTS
from diffusers_mixofshow.pipelines import MixOfShowPipeline


@pytest.fixture(scope="module")
def pipe():
    return toyland.load_pipeline(pipeline_class=MixOfShowPipeline)


def toy_pack(pipe, *names: str) -> EDLoRA:
    """Embeddings alone, the same of a concept in every pack."""
    layers = cross_attention_layers(pipe.unet)
    concepts = tuple(Concept.from_name(name, "critter", kind="character") for name in names)
    embeddings = {
        token: torch.randn(len(layers), 128, generator=torch.Generator().manual_seed(sum(token.encode())))
        for concept in concepts
        for token in concept.tokens
    }
    return EDLoRA(concepts=concepts, embeddings=embeddings, lora={}, base_model="toyland", layers=layers)


@pytest.fixture(scope="module")
def packs(pipe):
    return {"ruby": toy_pack(pipe, "ruby"), "azure": toy_pack(pipe, "azure"), "both": toy_pack(pipe, "ruby", "azure")}


def measured(pipe, packs, references, advance=lambda pictures: None):
    return evaluate_packs(
        pipe,
        packs,
        ToylandJudge.load(),
        references,
        templates=lambda concept: evaluation_prompts("toyland", concept.kind),
        sampling=Sampling(steps=2, guidance_scale=3.0),
        count=2,
        advance=advance,
    )


def test_what_a_pack_keeps_is_held_against_the_own_ed_lora(pipe, packs):
    told: list[int] = []
    blind = measured(pipe, packs, {}, told.append)
    assert sum(told) == picture_count(packs, 2) == 16
    assert pipe.concepts == {}
    assert [row.identity for row in blind.rows] == [None] * 7
    # With its own pictures as photos, each has gained much over the class word.
    photos = {f"<{name}>": Reference(photos=blind.pictures[f"<{name}>", name]) for name in ("ruby", "azure")}
    rows = {(row.concept, row.pack): row for row in measured(pipe, packs, photos).rows}
    assert list(rows) == [
        ("<ruby>", CLASS_WORD), ("<ruby>", "ruby"), ("<ruby>", "both"),
        ("<azure>", CLASS_WORD), ("<azure>", "azure"), ("<azure>", "both"), (MEAN, "both"),
    ]  # fmt: skip
    for concept in ("<ruby>", "<azure>", MEAN):
        assert rows[concept, "both"].retention == {"alignment": 1.0, "attributes": None}
        assert rows[concept, "both"].drift == pytest.approx(0, abs=1e-5)  # it has no weight updates
    both = [rows[concept, "both"] for concept in ("<ruby>", "<azure>")]
    assert min(row.text_alignment for row in both) > 0
    assert rows[MEAN, "both"].text_alignment == pytest.approx(sum(row.text_alignment for row in both) / 2)
    alignments = [row.identity.alignment for row in both]
    assert rows[MEAN, "both"].identity.alignment == pytest.approx(sum(alignments) / 2)
    assert rows["<ruby>", "ruby"].retention is None
    assert rows["<ruby>", "ruby"].identity.alignment > rows["<ruby>", CLASS_WORD].identity.alignment
    assert rows["<ruby>", CLASS_WORD].drift is None


def test_the_mean_says_nothing_of_what_is_kept_where_tuning_one_concept_gained_nothing(pipe, packs):
    blind = measured(pipe, packs, {}).pictures
    worse = {"<ruby>": blind["<ruby>", "ruby"], "<azure>": blind["<azure>", CLASS_WORD]}  # azure's tuning leads away
    references = {name: Reference(photos=photos) for name, photos in worse.items()}
    rows = {(row.concept, row.pack): row for row in measured(pipe, packs, references).rows}
    assert rows["<azure>", "both"].retention["alignment"] is None
    assert rows["<ruby>", "both"].retention["alignment"] == 1.0
    assert rows[MEAN, "both"].retention["alignment"] is None


def test_without_the_own_ed_loras_nothing_is_said_of_retention(pipe, packs):
    photos = [photo.image for photo in toyland.photos(toyland.CONCEPTS["bobo"], count=2)]
    evaluation = measured(pipe, {"both": packs["both"]}, {"<ruby>": Reference(photos=photos)})
    assert [row.retention for row in evaluation.rows] == [None] * 5
    assert [row.identity is None for row in evaluation.rows] == [False, False, True, True, True]
    noted_pack = record_rows(packs["both"], "both", evaluation, {"pictures": 2})
    entries = noted_pack.training["evaluation"]
    assert entries["pictures"] == 2
    assert set(entries["concepts"]) == {"<ruby>", "<azure>"}
    assert entries["concepts"]["<azure>"]["identity"] is None
    of_the_pack = {row.concept: row.as_record() for row in evaluation.rows if row.pack == "both"}
    assert entries["concepts"]["<ruby>"]["identity"] == of_the_pack["<ruby>"]["identity"]
    assert entries["concepts"]["<ruby>"]["drift"] == of_the_pack["<ruby>"]["drift"] is not None
    assert noted_pack.digest == packs["both"].digest


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A folder with a random CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    words = tiny.tokenizer()
    tiny.clip().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_a_clip_looks_at_pictures_of_any_size_and_at_texts(clip):
    judge = ClipJudge.load(str(clip))
    images = [Image.new("RGB", (50, 80), "red"), Image.new("L", (300, 20)), Image.new("RGB", (80, 50), "red")]
    features = judge.features(images)
    assert features.shape == judge.text_features(["a cat", "", "a long " * 99]).shape == (3, 96)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(features[0], features[2])
    assert not torch.allclose(features[0], features[1])


def test_a_clip_sees_what_clip_was_trained_on_and_reads_texts_as_clipscore_does(clip):
    """OpenAI's means and deviations of each colour; "A photo depicts" before each text; 33 pictures at once."""
    judge, model = ClipJudge.load(str(clip)), tiny.clip()
    noise = np.random.default_rng(0).integers(0, 256, (33, 64, 64, 3), dtype=np.uint8)
    colours = (noise / 255 - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    texts = ["a cat", "a dog in the snow"]
    ids = tiny.tokenizer()([f"A photo depicts {text}" for text in texts], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        seen = model.vision_model(pixel_values=torch.tensor(colours).float().permute(0, 3, 1, 2)).pooler_output
        read = model.text_model(input_ids=ids.input_ids).pooler_output
        pictures, words = model.visual_projection(seen), model.text_projection(read)
    found = judge.features([Image.fromarray(each) for each in noise])
    torch.testing.assert_close(found, pictures / pictures.norm(dim=1, keepdim=True))
    torch.testing.assert_close(judge.text_features(texts), words / words.norm(dim=1, keepdim=True))


def test_what_is_no_clip_is_refused(clip, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("/no/such/folder", str(tmp_path / "empty"), str(toyland.path() / "text_encoder")):
        with pytest.raises(ConfigurationError, match=r"metric model .* cannot be used"):
            ClipJudge.load(name)


def test_no_prompt_is_among_those_that_fusion_records():
    recorded = {text for texts in RECORDING_PROMPTS.values() for text in texts}
    for kind in KINDS:
        for base in ("toyland", "someone/base"):
            texts = evaluation_prompts(base, kind)
            assert all("<TOK>" in text for text in texts)
            assert not recorded & set(texts)
