"""Other programs' files by chance: read, told of and converted, or refused with an error of ours, and nothing else.

The bounds and the long run by hand are those of `test_fuzz`.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch


pytest.importorskip("hypothesis", reason="part of the extra 'dev'")

from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compatibility.generate import FOLDER
from diffusers_mixofshow.errors import MixOfShowError
from diffusers_mixofshow.interop import convert, read_as_edlora
from diffusers_mixofshow.interop.foreign import read_foreign
from diffusers_mixofshow.interop.formats import Format
from diffusers_mixofshow.interop.summary import summary_of_foreign
from hostile.test_fuzz import JSON, TEXT, places, put


PICKLES = sorted(path for path in FOLDER.rglob("*") if path.suffix in (".pth", ".pt", ".bin"))
SAFETENSORS = sorted(path for path in FOLDER.rglob("*.safetensors") if "format-1" not in path.parts)
TENSORS = st.builds(
    lambda shape, value, dtype: torch.full(shape, value).to(dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([0.0, 1.0, -1e30, float("nan"), float("inf")]),
    st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn]),
)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def read_all(path: Path, data) -> None:
    """Tell of a file, read it and write it anew as something else."""
    with suppress(MixOfShowError):
        json.dumps(summary_of_foreign(read_foreign(path)), allow_nan=False)
    with suppress(MixOfShowError):
        read_as_edlora(path)
    with suppress(MixOfShowError):
        convert(path, path.parent / "out", data.draw(st.sampled_from(list(Format))), name=data.draw(TEXT))


def renamed(name: str, data) -> str:
    """A name that is cut, doubled or another one's."""
    ways = [TEXT, st.just(name[: len(name) // 2]), st.just(name + name), st.just(name.replace("_", "."))]
    return data.draw(st.one_of(ways))


@given(data=st.data())
def test_bytes_changed_cut_and_inserted(folder, data):
    source = data.draw(st.sampled_from([*PICKLES, *SAFETENSORS]))
    changed = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(3000, len(changed)) - 1))
        changed[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path = folder / f"x{source.suffix}"
    path.write_bytes(bytes(changed))
    read_all(path, data)


@given(data=st.data())
def test_any_value_anywhere_in_a_pickle(folder, data):
    content = torch.load(data.draw(st.sampled_from(PICKLES)), weights_only=True)
    for _ in range(data.draw(st.integers(1, 3))):
        content = put(content, data.draw(st.sampled_from(list(places(content)))), data.draw(st.one_of(JSON, TENSORS)))
    torch.save(content, folder / "x.pth")
    read_all(folder / "x.pth", data)


def test_a_half_of_an_update_that_is_no_tensor_is_named(folder):
    """Found by the fuzzing above."""
    content = torch.load(FOLDER / "mix-of-show" / "research.pth", weights_only=True)
    half = next(iter(content["params"]["unet"]))
    content["params"]["unet"][half] = None
    torch.save(content, folder / "x.pth")
    assert any(half in defect for defect in read_foreign(folder / "x.pth").defects)


@given(data=st.data())
def test_any_names_and_tensors_in_safetensors(folder, data):
    content = load_file(data.draw(st.sampled_from(SAFETENSORS)))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(list(content)))
        tensor = content[name] if data.draw(st.booleans()) else data.draw(TENSORS)
        content = {other: value for other, value in content.items() if other != name or data.draw(st.booleans())}
        content[renamed(name, data)] = tensor.clone()
    metadata = data.draw(st.dictionaries(st.sampled_from(["ss_network_dim", "ss_sd_model_name", "x"]), TEXT))
    save_file(content, folder / "x.safetensors", metadata=metadata)
    read_all(folder / "x.safetensors", data)
