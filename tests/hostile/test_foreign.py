"""The same broken files under names of other programs: what is not ours is read as carefully."""

from __future__ import annotations

import os

import pytest

from hostile.broken import CASES, make
from hostile.test_broken_files import CONTROLS, command_line, in_time, put


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pth", "learned_embeds.bin"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_file_of_another_program(case, name, sound, tmp_path, monkeypatch, capsys):
    path = put(case, sound, tmp_path)
    if path.is_symlink() or path.exists():
        path = path.rename(path.with_name(name))
    with in_time():
        code = command_line(monkeypatch, "inspect", path)
    output = capsys.readouterr()
    assert code in (0, 1, 2)  # with its header gone an ED-LoRA is a sound LoRA
    assert "Traceback" not in output.out + output.err
    assert not CONTROLS.search(output.out + output.err.replace("\x1b[31m", "").replace("\x1b[0m", ""))
    assert "attacked" not in os.listdir(path.parent)
