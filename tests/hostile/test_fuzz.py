"""Files by chance: a reader returns what it read or raises an error of ours, and nothing else, ever.

A longer run by hand, on other examples each time: FUZZ_EXAMPLES=20000 pytest tests/hostile/test_fuzz.py
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest


pytest.importorskip("hypothesis", reason="part of the extra 'dev'")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.card import refresh_text
from diffusers_mixofshow.errors import MixOfShowError
from diffusers_mixofshow.fusion.pack import FusedPack
from diffusers_mixofshow.fusion.published import SourceStatistics
from diffusers_mixofshow.regions import Layout
from hostile.broken import FILE, Sound, content, make


EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))

settings.register_profile(
    "files",
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=timedelta(seconds=20),
    suppress_health_check=list(HealthCheck),
    database=None,
)
settings.load_profile("files")

TEXT = st.text(max_size=40)
NUMBERS = st.one_of(
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([10**400, 2**63, 2**64, -(2**63), 1e308, float("nan"), float("inf")]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Sound:
    return make(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def read_all(folder: Path, data: bytes) -> None:
    """Give the same bytes to every reader."""
    path = folder / FILE
    path.write_bytes(data)
    for read in (EDLoRA.from_pretrained, FusedPack.from_pretrained, SourceStatistics.load, Layout.load):
        with suppress(MixOfShowError):
            read(path)


def places(value, path=()):
    """Every place in nested dicts and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def put(value, path, new):
    """The value with something else at a place, or without it where that is None."""
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = put(value[path[0]], path[1:], new)
    return value


@given(data=st.data())
def test_any_bytes(folder, data):
    read_all(folder, data.draw(st.binary(max_size=200)))


@given(data=st.data())
def test_bytes_changed_cut_and_inserted(sound, folder, data):
    changed = bytearray(sound.raw)
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the changes hit the header.
        end = data.draw(st.sampled_from([8, sound.text_length, len(changed)]))
        place = data.draw(st.integers(0, min(end, len(changed)) - 1 if changed else 0))
        action = data.draw(st.sampled_from(["set", "cut", "insert", "remove"]))
        if action == "set" and changed:
            changed[place] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del changed[place:]
        elif action == "insert":
            changed[place:place] = data.draw(st.binary(min_size=1, max_size=16))
        else:
            del changed[place : place + data.draw(st.integers(1, 64))]
    read_all(folder, bytes(changed))


@given(data=st.data())
def test_any_json_anywhere_in_the_header_of_safetensors(sound, folder, data):
    place = data.draw(st.sampled_from(list(places(sound.header))))
    header = put(sound.header, place, data.draw(JSON))
    read_all(folder, content(json.dumps(header).encode(), sound.data))


@given(data=st.data())
def test_any_json_anywhere_in_our_header(sound, folder, data):
    place = data.draw(st.sampled_from(list(places(sound.ours))))
    ours = put(sound.ours, place, data.draw(JSON))
    header = put(sound.header, ("__metadata__", "edlora"), json.dumps(ours))
    read_all(folder, content(header, sound.data))


SOURCE = {"concepts": ["<rex>"], "weight": 1.0, "scale": 1.0, "origin": "", "digest": "0" * 64, "revision": ""}
FUSION = {
    "method": "closed-form",
    "ridge": 0.01,
    "max_rank": None,
    "sources": [SOURCE],
    "residuals": {"mean": {"<rex>": {"average": 0.5, "fused": 0.1}}, "layers": {}},
}


@given(data=st.data())
def test_any_json_anywhere_in_the_record_of_fusion(sound, folder, data):
    fusion = put(FUSION, data.draw(st.sampled_from(list(places(FUSION)))), data.draw(JSON))
    ours = sound.ours | {"training": {"fusion": fusion}}
    header = put(sound.header, ("__metadata__", "edlora"), json.dumps(ours))
    read_all(folder, content(header, sound.data))
    try:
        pack = EDLoRA.from_pretrained(folder)
        pack.save_pretrained(folder / "again", overwrite=True)
    except MixOfShowError:
        return
    assert (folder / "again" / "README.md").read_text()


def test_a_weight_that_no_float_holds_is_left_out_of_the_card(sound, folder):
    """Found by the long run of the fuzzing above."""
    fusion = put(FUSION, ("sources", 0, "weight"), 10**400)
    header = put(sound.header, ("__metadata__", "edlora"), json.dumps(sound.ours | {"training": {"fusion": fusion}}))
    read_all(folder, content(header, sound.data))
    EDLoRA.from_pretrained(folder).save_pretrained(folder / "again", overwrite=True)
    assert "<rex>" in (folder / "again" / "README.md").read_text()


LAYOUT = {
    "format": "mixofshow-layout",
    "version": 1,
    "prompt": "two",
    "width": 64,
    "height": 64,
    "regions": [{"prompt": "a", "box": [0, 0, 0.5, 1], "weight": 2, "feather": 0.1, "order": 1, "start": 0.1}],
}


@given(data=st.data())
def test_any_json_anywhere_in_a_layout(folder, data):
    layout = put(LAYOUT, data.draw(st.sampled_from(list(places(LAYOUT)))), data.draw(JSON))
    (folder / "layout.json").write_text(json.dumps(layout))
    with suppress(MixOfShowError):
        Layout.load(folder / "layout.json")


@given(text=st.text(), around=st.text(alphabet="-\n#ab:[]{}&*! ", max_size=60))
def test_any_card_on_the_hub(sound, folder, text, around):
    (folder / "pack").mkdir(exist_ok=True)
    (folder / "pack" / FILE).write_bytes(sound.raw)
    card = EDLoRA.from_pretrained(folder / "pack")._card("here", False, {}, None)
    for existing in (text, f"---\n{around}\n---\n{text}", str(card) + text, f"{text}{card}{around}"):
        assert refresh_text(existing, card)
