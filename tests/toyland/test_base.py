"""The shipped base: small, quick to load, and usable as it comes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.toyland_base.quality import identity_of
from diffusers_mixofshow import Region, toyland
from diffusers_mixofshow.errors import ConceptError
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge
from diffusers_mixofshow.pipelines import MixOfShowAdapterPipeline, MixOfShowPipeline
from diffusers_mixofshow.sampling.loading import load_base
from diffusers_mixofshow.toyland.scenes import random_scene
from diffusers_mixofshow.toyland.world import CLASSES, draw


def _run_python(code: str) -> str:
    """Standard output and error of `code` in a fresh interpreter that finds the package."""
    source = str(Path(toyland.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_everything_together_is_at_most_16_megabytes() -> None:
    files = [file for file in toyland.path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt")]


@pytest.mark.parametrize(
    ("name", "kind", "megabytes", "side"),
    [("toyland-sd3", "StableDiffusion3Pipeline", 12.2, 64), ("toyland-xl", "StableDiffusionXLPipeline", 15, 96)],
)
def test_another_base_is_small_and_draws_as_diffusers_loads_it(
    name: str, kind: str, megabytes: float, side: int
) -> None:
    files = [file for file in toyland.path(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= megabytes * 1e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt")]
    pipeline = load_base(name, "cpu", "float32", concepts=False)
    assert type(pipeline).__name__ == kind
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        ["a red vase in a meadow", "a white cat in a room"],
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    ).images
    assert [image.size for image in images] == [(side, side)] * 2
    found = ToylandJudge.load().read(images)
    assert [(one["class"], one["colour"]) for one in found] == [("vase", "red"), ("cat", "white")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("toyland", "StableDiffusionPipeline"),
        ("toyland-sd3", "StableDiffusion3Pipeline"),
        ("toyland-xl", "StableDiffusionXLPipeline"),
    ],
)
def test_every_embedded_base_is_loaded_as_the_pipeline_of_diffusers_that_it_is(name: str, kind: str) -> None:
    pipeline = toyland.load_pipeline(base_model=name)
    assert type(pipeline).__name__ == kind
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {part.dtype for part in parts} == {torch.float32}


def test_regions_of_stable_diffusion_xl_draw_what_they_ask_for_in_their_place() -> None:
    pipeline = load_base("toyland-xl", "cpu", "float32")
    pipeline.set_progress_bar_config(disable=True)
    asked = ["a red vase", "a white cat"]
    halves = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    picture = pipeline(
        "two things in the meadow",
        regions=[Region(f"{thing} in the meadow", box=box) for thing, box in zip(asked, halves, strict=True)],
        width=192,
        height=96,
        num_inference_steps=12,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    found = ToylandJudge.load().read([picture.crop((96 * side, 0, 96 * side + 96, 96)) for side in (0, 1)])
    assert [(one["class"], one["colour"]) for one in found] == [("vase", "red"), ("cat", "white")]


def test_the_pipeline_loads_fast_and_samples_a_picture() -> None:
    toyland.load_pipeline()
    started = time.process_time()  # of this process, so that a busy machine does not count
    pipeline = toyland.load_pipeline()
    assert time.process_time() - started < 2
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red critter in a meadow", num_inference_steps=4, generator=torch.manual_seed(0)).images
    assert images[0].size == (64, 64)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_loading_prints_nothing_and_leaves_logging_as_it_was() -> None:
    code = """
from diffusers_mixofshow import Region, toyland
toyland.load_pipeline()
toyland.load_metric_model()
from diffusers.utils import logging as ours
from diffusers_mixofshow import MixOfShowPipeline
from transformers.utils import logging as theirs
print("loading")
def told():
    return [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in (ours, theirs)]
before = told()
MixOfShowPipeline.from_pretrained("toyland")
assert told() == before
"""
    assert _run_python(code) == "loading\n"


def test_importing_toyland_imports_nothing_heavy() -> None:
    code = "import sys, diffusers_mixofshow.toyland; print({'torch', 'diffusers'} & set(sys.modules))"
    assert _run_python(code).strip() == "set()"


def test_the_metric_model_gives_unit_vectors_of_one_space() -> None:
    metric = toyland.load_metric_model()
    images = metric.image_features([draw(random_scene(seed, things=1)).image for seed in range(3)])
    texts = metric.text_features([f"a photo of a {name}" for name in CLASSES])
    assert images.shape[1] == texts.shape[1]
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(len(CLASSES)))


def test_the_reader_tells_concepts_apart_on_their_photos() -> None:
    reader = toyland.load_reader()
    for name in ("bobo", "momo"):
        images = [photo.image for photo in toyland.photos(toyland.CONCEPTS[name], 6)]
        other = "momo" if name == "bobo" else "bobo"
        assert reader.agreement(images, identity_of(name)).mean() > 0.85
        assert reader.agreement(images, identity_of(other)).mean() < 0.5


def test_the_reader_explains_what_it_cannot_read() -> None:
    images = [draw(random_scene(0)).image]
    with pytest.raises(ConceptError, match="shoes=red"):
        toyland.load_reader().agreement(images, {"shoes": "red"})


def test_the_layout_adapter_says_where_a_thing_stands() -> None:
    """In a wide picture with one thing, the third that the layout names is no longer the empty background."""
    pipeline = MixOfShowAdapterPipeline.from_pipe(
        toyland.load_pipeline(MixOfShowPipeline), adapter=toyland.load_layout_adapter()
    )
    pipeline.set_progress_bar_config(disable=True)
    reader = toyland.load_reader()
    dogs = []
    for third in range(3):
        box = (third / 3, 0.25, (third + 1) / 3, 0.97)
        layout = toyland.draw_places(toyland.stand_in([box], ["dog"], 96), 96)
        image = pipeline(
            "a brown dog in the snow",
            image=layout,
            num_inference_steps=12,
            guidance_scale=3.0,
            generator=torch.manual_seed(third),
        ).images[0]
        assert image.size == (96, 64)
        left = min(max(32 * third - 3, 0), 58)
        found = reader.read([image.crop((left, 24, left + 38, 62)).resize((64, 64))])["class"].argmax()
        dogs.append(reader.vocabulary["class"][int(found)])
    assert dogs == ["dog"] * 3


def test_places_are_ellipses_in_their_boxes() -> None:
    picture = toyland.draw_places([(0.0, 0.0, 0.5, 1.0)], 96, 64)
    assert picture.mode == "L"
    assert picture.size == (96, 64)
    assert picture.getbbox() == (0, 0, 49, 64)
    assert picture.getpixel((24, 32)) == 255
    assert picture.getpixel((1, 1)) == 0


def test_what_stands_in_a_box_stays_inside_of_it() -> None:
    for box in ((0.0, 0.25, 1 / 3, 0.97), (0.5, 0.0, 1.0, 0.2), (0.9, 0.1, 1.0, 1.0)):
        for class_word in CLASSES:
            (left, top, right, bottom) = toyland.stand_in([box], [class_word], 96, 64)[0]
            assert box[0] <= left < right <= box[2]
            assert box[1] <= top < bottom <= box[3]
