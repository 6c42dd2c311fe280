"""The CLIP judge against transformers' own processor and model, and against CLIPScore as it is defined.

CLIPScore (arXiv:2104.08718): 2.5 * max(cos, 0) of a picture and "A photo depicts" with its text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

import tiny
from diffusers_mixofshow.evaluation.clip_judge import ClipJudge
from diffusers_mixofshow.evaluation.metrics import clip_score


SIZES = [(64, 64), (224, 224), (97, 64), (64, 97), (500, 300), (300, 501), (33, 200)]
TEXTS = ["a cat", "a dog in the snow", "", "two red chairs", "a vase, at night", "a meadow", "the beach"]


def picture(number: int) -> Image.Image:
    """Lines and ellipses, whose every pixel matters to how a picture is resized and cut."""
    width, height = SIZES[number]
    image = Image.new("RGB", (width, height), (200, 30 * number, 90))
    pen = ImageDraw.Draw(image)
    for place in range(0, width + height, 7):
        pen.line((place, 0, place - height, height), (5 * number, place % 256, 255 - place % 256), 2)
    pen.ellipse((width // 5, height // 4, width - 9, height - 3), "white", "black")
    return image


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> ClipJudge:
    folder: Path = tmp_path_factory.mktemp("clip")
    tiny.clip().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return ClipJudge.load(str(folder))


@pytest.fixture(scope="module")
def reference() -> Any:
    """What CLIPProcessor and CLIPModel make of the pictures, and of the texts with CLIPScore's prefix."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    side = {"height": 64, "width": 64}
    of_images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=side)
    processor = CLIPProcessor(image_processor=of_images, tokenizer=tiny.tokenizer())
    given = processor(
        text=[f"A photo depicts {text}" for text in TEXTS],
        images=[picture(number) for number in range(len(SIZES))],
        return_tensors="pt",
        padding="max_length",
    )
    with torch.no_grad():
        return tiny.clip()(**given)


@pytest.mark.parametrize("number", range(len(SIZES)), ids=[f"{width}x{height}" for width, height in SIZES])
def test_a_picture_of_any_shape_is_prepared_as_by_the_clip_processor(
    judge: ClipJudge, reference: Any, number: int
) -> None:
    found = judge.features([picture(number)])[0]
    torch.testing.assert_close(found, reference.image_embeds[number], atol=1e-5, rtol=0)


def test_texts_are_read_as_by_the_clip_processor_after_the_prefix(judge: ClipJudge, reference: Any) -> None:
    torch.testing.assert_close(judge.text_features(TEXTS), reference.text_embeds, atol=1e-5, rtol=0)


def test_the_score_is_clipscores(judge: ClipJudge, reference: Any) -> None:
    """Random weights may give cosines of one sign alone: with the texts' features turned around, both occur."""
    cosines = (reference.text_embeds * reference.image_embeds).sum(dim=1)
    pictures, texts = judge.features([picture(number) for number in range(len(SIZES))]), judge.text_features(TEXTS)
    for sign in (1, -1):
        expected = [2.5 * max(sign * cosine, 0) for cosine in cosines.tolist()]
        for number, score in enumerate(expected):
            one = clip_score(sign * texts[number : number + 1], pictures[number : number + 1])
            assert one == pytest.approx(score, abs=1e-5)
        assert clip_score(sign * texts, pictures) == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert cosines.abs().max() > 1e-3
