"""Damaged files of every program: each is read or refused with an error of ours, nothing else comes out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from compatibility.generate import FOLDER
from diffusers_mixofshow.errors import MixOfShowError
from diffusers_mixofshow.interop import read_as_edlora
from diffusers_mixofshow.interop.foreign import read_foreign
from diffusers_mixofshow.interop.summary import summary_of_foreign


FILES = sorted(path for path in FOLDER.rglob("*") if path.suffix in (".pth", ".pt", ".bin", ".safetensors"))


def _read(path: Path, content: bytes) -> bool:
    """Whether a file is read; anything but an error of ours is passed on."""
    path.write_bytes(content)
    try:
        summary_of_foreign(read_foreign(path))
        read_as_edlora(path)
    except MixOfShowError:
        return False
    return True


@pytest.mark.parametrize("source", FILES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_cut_and_scratched(tmp_path: Path, source: Path):
    content, chance = source.read_bytes(), random.Random(source.name)
    for _ in range(6):
        assert not _read(tmp_path / source.name, content[: chance.randrange(len(content) - 1)])
    for count in (1, 2, 5, 30):
        scratched = bytearray(content)
        for _ in range(count):
            scratched[chance.randrange(min(len(content), 3000))] = chance.randrange(256)
        _read(tmp_path / source.name, bytes(scratched))
