"""Files that people have are read today as on the day they were written. See docs/formats.md for the policy."""

from __future__ import annotations

import json

import pytest
import torch

from compatibility.generate import EXPECTED, FILES, FOLDER, told
from diffusers_mixofshow.edlora.header import FORMAT_VERSION
from diffusers_mixofshow.interop import read_as_edlora
from diffusers_mixofshow.interop.foreign import read_foreign


def test_no_file_is_forgotten():
    present = {path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("*/*")}
    assert present == FILES.keys() == json.loads(EXPECTED.read_text()).keys()
    assert len(present) == 21


def test_every_format_version_has_files():
    assert all(
        (FOLDER / f"format-{version}" / "edlora.safetensors").is_file() for version in range(1, FORMAT_VERSION + 1)
    )


def test_files_are_small():
    assert max(path.stat().st_size for path in FOLDER.rglob("*")) < 100_000


@pytest.mark.parametrize("name", FILES)
def test_a_file_reads_as_on_its_first_day(name: str):
    assert told(FOLDER / name) == json.loads(EXPECTED.read_text())[name]


def test_both_layouts_of_the_authors_hold_the_same():
    released, research = (read_as_edlora(FOLDER / "mix-of-show" / f"{name}.pth") for name in ("released", "research"))
    assert released.digest == research.digest


def test_every_spelling_of_one_textual_inversion_holds_the_same():
    names = ("a1111/potter.pt", "a1111/potter.safetensors", "diffusers/learned_embeds.safetensors")
    found = [read_as_edlora(FOLDER / name) for name in (*names, "diffusers/potter_emb.safetensors")]
    assert len({one.digest for one in found}) == 1
    assert torch.equal(found[0].embeddings["<potter1>"][3], found[0].embeddings["<potter1>"][7])


def test_nothing_in_them_is_defective():
    foreign = [name for name in FILES if not name.startswith("format-")]
    assert {name: read_foreign(FOLDER / name).defects for name in foreign} == dict.fromkeys(foreign, ())
