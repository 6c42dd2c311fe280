"""The same broken files under names of other programs: what is not ours is read as carefully."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


EVIL = "\x1b]0;evil\x07"
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def halves(layer: str = LAYER, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_down.weight": torch.ones(4, 768), f"{layer}.lora_up.weight": torch.ones(320, 4), **more}


def packed(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


CONTENTS = {
    "a base's name": lambda file: save_file(halves(), file, metadata={"ss_sd_model_name": EVIL}),
    "a word": lambda file: save_file({f"<{EVIL}>": torch.ones(1, 768), "<b>": torch.ones(1, 768)}, file),
    "a bundled word": lambda file: save_file(halves(**{f"bundle_emb.{EVIL}.clip_l": torch.ones(1, 768)}), file),
    "a swollen tensor": lambda file: torch.save({EVIL: torch.zeros(1).expand(10**6)}, file.with_suffix(".pt")),
    "a token": lambda file: torch.save(
        {"params": {"new_concept_embedding": {f"<{EVIL}>": torch.ones(16, 768)}, "text_encoder": {}, "unet": {}}},
        file.with_suffix(".pt"),
    ),
    "a complex alpha": lambda file: save_file(halves(**{f"{LAYER}.alpha": torch.tensor(1 + 1j)}), file),
    "a number of 5000 digits": lambda file: save_file(
        halves(f"lora_unet_input_blocks_{'9' * 5000}_1_transformer_blocks_0_attn2_to_k"), file
    ),
    "a block of 5000 digits": lambda file: save_file(
        halves(f"lora_unet_down_blocks_{'9' * 5000}_attentions_0_transformer_blocks_0_attn2_to_k")
        | {"bundle_emb.a.clip_l": torch.ones(1, 768)},
        file,
    ),
}
if hasattr(torch, "float4_e2m1fn_x2"):
    CONTENTS |= {
        "4 bits": lambda file: save_file(halves() | {f"{LAYER}.lora_down.weight": packed(4, 768)}, file),
        "an alpha of 4 bits": lambda file: save_file(halves(**{f"{LAYER}.alpha": packed(1)}), file),
        "a word of 4 bits": lambda file: save_file({"<x>": packed(1, 768)}, file),
    }


@pytest.mark.parametrize("case", CONTENTS)
@pytest.mark.parametrize("verb", ["inspect", "convert"])
def test_no_content_breaks_a_command_or_the_terminal(case, verb, tmp_path, monkeypatch, capsys):
    CONTENTS[case](tmp_path / "x.safetensors")
    (file,) = tmp_path.iterdir()
    more = (tmp_path / "out", "--to", "edlora") if verb == "convert" else ()
    code = command_line(monkeypatch, verb, file, *more)
    output = capsys.readouterr()
    assert code in (0, 1, 2)
    assert "Traceback" not in output.out + output.err
    told = output.out + output.err
    for colour in ("\x1b[31m", "\x1b[33m", "\x1b[0m"):
        told = told.replace(colour, "")
    assert not CONTROLS.search(told)
