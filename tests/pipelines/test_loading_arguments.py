"""Arguments of `load_edlora`: understood as they were meant, or refused in one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_mixofshow.errors import ConfigurationError


NAMED = {
    "second": (("a_name",), {}),
    "second, by keyword": ((), {"adapter_name": "a_name"}),
    "after the scale": ((0.5, "a_name"), {}),
    "in place of the scale": ((), {"scale": "a_name"}),
}


@pytest.mark.parametrize(("arguments", "named"), NAMED.values(), ids=NAMED)
def test_a_text_is_the_adapters_name(pipe, make_pack, arguments, named):
    pipe.load_edlora(make_pack("rex"), *arguments, **named)
    assert list(pipe.get_list_adapters()["unet"]) == ["a_name"]


@pytest.mark.parametrize("scale", [0, 1, 2, 0.5, -1.0, np.float32(0.5), np.int64(1), torch.tensor(0.5), True - 0.5])
def test_any_number_is_a_scale(pipe, make_pack, latents, scale):
    pipe.load_edlora(make_pack("rex"), scale)
    found = latents(pipe, "a <rex>")
    pipe.unload_edlora()
    pipe.load_edlora(make_pack("rex"), scale=float(scale))
    assert torch.equal(latents(pipe, "a <rex>"), found)


REFUSED = {
    "a dict": (({"rex": 0.5},), {}, "scale is a dict; expected a number"),
    "a list": (([0.5],), {}, "scale is a list"),
    "none": ((None,), {}, "scale is None"),
    "a switch": ((True,), {}, "scale is True"),
    "no number": ((float("nan"),), {}, "scale is nan"),
    "endless": ((float("inf"),), {}, "scale is inf"),
    "several numbers": ((torch.zeros(2),), {}, "scale is a Tensor"),
    "a number in quotes": (("0.8",), {}, "scale is '0.8'; expected a number"),
    "a whole one": (("1",), {}, "scale is '1'; expected a number"),
    "a name twice": (("rex",), {"adapter_name": "kit"}, "scale is 'rex'; expected a number"),
    "the wrong way round": (("rex", 0.8), {}, "adapter_name is 0.8; expected a text"),
    "a number as name": ((), {"adapter_name": 1}, "adapter_name is 1"),
    "weight": ((), {"weight": 0.8}, "there is no argument weight; expected scale, adapter_name"),
    "several": (({},), {"weight": 1, "name": "x"}, "scale is a dict.*; there is no argument weight, name"),
    "a malformed name": (("my rex",), {}, "Adapter name 'my rex' cannot be used"),
}


@pytest.mark.parametrize(("arguments", "named", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_scale_and_no_name_is_refused_in_one_line(pipe, make_pack, arguments, named, message):
    with pytest.raises(ConfigurationError, match=message) as told:
        pipe.load_edlora(make_pack("rex"), *arguments, **named)
    assert "\n" not in str(told.value)
    assert not pipe.concepts


@pytest.mark.parametrize("source", [None, 3, ["a", "b"], {"unet.x": torch.zeros(1000)}, torch.zeros(1000), b"x", Path])
def test_what_is_no_source_is_refused_in_one_line(pipe, source):
    with pytest.raises(
        ConfigurationError, match=re.escape("expected a Hub id, a folder, a file or an EDLoRA")
    ) as told:
        pipe.load_edlora(source)
    assert len(str(told.value)) < 200
