"""Regions drawn anew at a higher resolution."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.pipelines import refine_regions, refining
from diffusers_mixofshow.regions import Region


SMALL = Region("a <potter>", box=(0.25, 0.25, 0.5, 0.75), negative_prompt="beard")
ALIKE = Region("a dog", box=(0.6, 0.25, 0.85, 0.75))
CALL = {"size": 32, "num_inference_steps": 3, "strength": 0.7}


@pytest.fixture
def potter(pipe, make_pack):
    """The pipeline with one concept."""
    pipe.load_edlora(make_pack("potter"))
    return pipe


@pytest.fixture
def images():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (32, 40, 3), dtype=np.uint8)) for _ in range(2)]


def _refine(pipe, images, regions, **settings):
    return refine_regions(pipe, images, regions, generator=torch.Generator().manual_seed(0), **{**CALL, **settings})


def test_a_region_is_drawn_anew_and_the_rest_stays(potter, images):
    before = [np.asarray(image).copy() for image in images]
    results = _refine(potter, images, [SMALL], feather=0.05)
    assert all(np.array_equal(np.asarray(image), old) for image, old in zip(images, before, strict=True))
    for result, old in zip(results, before, strict=True):
        changed = (np.asarray(result) != old).any(axis=-1)
        assert changed[10:22, 12:18].mean() > 0.9
        assert not changed[:6].any()
        assert not changed[:, 24:].any()


def test_its_own_prompts_are_used(potter, images):
    first = _refine(potter, images[:1], [SMALL])
    for other in (
        Region("a dog", box=SMALL.box, negative_prompt="beard"),
        Region("a <potter>", box=SMALL.box, negative_prompt="hat"),
    ):
        assert not np.array_equal(np.asarray(_refine(potter, images[:1], [other])[0]), np.asarray(first[0]))
    plain = Region("a <potter>", box=SMALL.box)
    again = _refine(potter, images[:1], [plain], negative_prompt="beard")
    assert np.array_equal(np.asarray(again[0]), np.asarray(first[0]))


def test_regions_of_one_size_are_one_pass(potter, images, monkeypatch):
    sizes = []
    call = refining._ImageToImage.__call__

    def counted(self, prompt, **settings):
        sizes.append((len(prompt), settings["image"][0].size))
        return call(self, prompt, **settings)

    monkeypatch.setattr(refining._ImageToImage, "__call__", counted)
    _refine(potter, images, [SMALL, ALIKE])
    wide = Region("wide", box=(0.1, 0.4, 0.9, 0.6))
    _refine(potter, images, [SMALL, ALIKE, wide], batch_size=3)
    assert [count for count, _ in sizes] == [4, 3, 1, 2]
    assert all(width % 8 == height % 8 == 0 for _, (width, height) in sizes)


def test_large_regions_are_left_as_they_are(potter, images):
    everything = Region("all", box=(0, 0, 1, 1))
    (result,) = _refine(potter, images[:1], [everything])
    assert np.array_equal(np.asarray(result), np.asarray(images[0]))


def test_the_pipeline_is_not_changed(potter, images):
    processors, config = dict(potter.unet.attn_processors), dict(potter.config)
    _refine(potter, images[:1], [SMALL])
    assert all(potter.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert dict(potter.config) == config
    assert list(potter.concepts) == ["<potter>"]


def test_every_defect_is_named_at_once(potter):
    with pytest.raises(RegionError, match=r"a str is no picture.*a dict is no Region"):
        _refine(potter, ["photo.png"], [{}])
