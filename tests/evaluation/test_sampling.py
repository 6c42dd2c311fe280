"""Pictures to be measured: every setting reaches the pipeline, and seeds do not hang on how pictures are batched."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
from PIL import Image

from diffusers_mixofshow.evaluation.sampling import Sampling, fill_templates, sample_pictures
from diffusers_mixofshow.regions import Region


class Pipe:
    """Notes what it is asked for; a picture's colour is its seed."""

    components: Mapping[str, object] = MappingProxyType({})  # without any, it is taken for a Stable Diffusion

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._progress_bar_config: dict[str, Any] = {}

    def set_progress_bar_config(self, **config: Any) -> None:
        self._progress_bar_config = config

    def __call__(self, **asked: Any) -> Any:
        self.calls.append(asked)
        seeds = [generator.initial_seed() for generator in asked["generator"]]
        return type("Output", (), {"images": [Image.new("L", (1, 1), seed) for seed in seeds]})


def seeds_of(pictures: list[Image.Image]) -> list[int]:
    return [int(picture.getpixel((0, 0))) for picture in pictures]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 6])
def test_seeds_count_on_from_the_first_whatever_the_batch_size(batch_size: int) -> None:
    pipe, told = Pipe(), []
    sampling = Sampling(first_seed=40, batch_size=batch_size)
    prompts = [f"{number}" for number in range(5)]
    pictures = sample_pictures(pipe, prompts, sampling, first=3, advance=told.append)
    assert seeds_of(pictures) == [43, 44, 45, 46, 47]
    assert [prompt for call in pipe.calls for prompt in call["prompt"]] == prompts
    assert [len(call["prompt"]) for call in pipe.calls] == told
    assert told == [batch_size] * (5 // batch_size) + [5 % batch_size] * (5 % batch_size > 0)


def test_every_setting_reaches_the_pipeline() -> None:
    pipe, region = Pipe(), Region("x", box=(0, 0, 1, 1))
    sampling = Sampling(steps=3, guidance_scale=2.5, height=24, width=40)
    sample_pictures(pipe, ["a", "b"], sampling, regions=(region,), isolation="as asked")
    (call,) = pipe.calls
    del call["generator"]
    assert call == {
        "prompt": ["a", "b"], "negative_prompt": ["", ""], "regions": [region], "num_inference_steps": 3,
        "guidance_scale": 2.5, "height": 24, "width": 40, "isolation": "as asked",
    }  # fmt: skip
    assert seeds_of(sample_pictures(pipe, ["a"], Sampling())) == [1]
    usual = pipe.calls[-1]
    names = ("regions", "num_inference_steps", "guidance_scale", "height", "width")
    assert [usual[name] for name in names] == [None, 20, 7.5, None, None]
    sample_pictures(pipe, ["x"] * 7, Sampling())
    assert [len(call["prompt"]) for call in pipe.calls[-2:]] == [6, 1]


def test_templates_are_taken_in_turn() -> None:
    assert fill_templates(["a <TOK>", "<TOK> and <TOK>"], "x", 3) == ["a x", "x and x", "a x"]
    assert fill_templates(["a <TOK>", "my <TOK>"], "x", 1) == ["a x"]
