"""A warning names the user's line, however deep in the package and in diffusers it was noticed."""

import inspect

import pytest
from PIL import Image

from diffusers_mixofshow import MixOfShowImg2ImgPipeline
from diffusers_mixofshow.errors import MixOfShowWarning
from diffusers_mixofshow.regions import Draft, Isolation, Region
from pipelines.conftest import SETTINGS


IDLE = Region("a dog", box=(0, 0, 0.01, 0.01), rounding="inward")

CALLS = {
    "arguments without regions": lambda pipe: pipe("x", isolation=Isolation(), **SETTINGS),
    "a region without a cell": lambda pipe: pipe("x", regions=[IDLE], **SETTINGS),
    "a region and a draft": lambda pipe: pipe(
        "x", regions=[IDLE], draft=Draft(), **SETTINGS | {"num_inference_steps": 1}
    ),
    "another pipeline": lambda pipe: MixOfShowImg2ImgPipeline.from_pipe(pipe)(
        "x", image=Image.new("RGB", (32, 32)), regions=[IDLE], strength=1.0, num_inference_steps=2
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_warnings_point_at_the_line_of_the_user(pipe, call):
    with pytest.warns(MixOfShowWarning) as told:
        call(pipe)
    lines, first = inspect.getsourcelines(call)
    ours = [warning for warning in told if isinstance(warning.message, MixOfShowWarning)]
    assert [warning.filename for warning in ours] == [__file__] * len(ours)
    assert all(first <= warning.lineno < first + len(lines) for warning in ours)
