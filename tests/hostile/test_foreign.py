"""The same broken files under names of other programs: what is not ours is read as carefully."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

import packs
import tiny
from diffusers_mixofshow.cli.next_commands import describe_next_of_pack
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA
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


def test_commands_to_be_pasted_hold_the_words_of_a_pack_as_plain_text(tmp_path):
    words = {"one": "$(touch attacked)", "two": "cat'\"; touch attacked; `touch attacked`"}
    concepts = [Concept.from_name(name, word) for name, word in words.items()]
    packs.random_pack(tiny.components(), *concepts).save_pretrained(tmp_path / "pack")
    told = describe_next_of_pack(EDLoRA.from_pretrained(tmp_path / "pack"), Path("two; touch attacked"), ["$HOME"])
    sample, evaluate = (shlex.split(line) for line in told[1:])
    assert sample[:4] == ["mixofshow", "sample", "--concepts", "two; touch attacked"]
    assert sample[5] == f"a {words['one']} and a {words['two']} in a meadow"
    assert evaluate == ["mixofshow", "evaluate", "two; touch attacked", "--own", "$HOME"]
    for line in told[1:]:  # what the shell would run is one command, in which nothing is left to expand
        assert shlex.join(shlex.split(line)) == line.strip()
