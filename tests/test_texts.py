"""Texts as editors of all systems write them."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

import pytest

from diffusers_mixofshow.cli.settings import read_config
from diffusers_mixofshow.errors import TextError
from diffusers_mixofshow.texts import read_text
from diffusers_mixofshow.training.config import TrainingConfig


TEXT = "a <TOK> in a café\nat night\n"


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ],
)
def test_encodings_and_ends_of_lines(tmp_path: Path, mark: bytes, encoding: str, ends: str) -> None:
    (tmp_path / "a.txt").write_bytes(mark + TEXT.replace("\n", ends).encode(encoding))
    assert read_text(tmp_path / "a.txt") == TEXT


def test_only_ends_of_lines_are_changed(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0bfour"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("ok\nin a café".encode("cp1252"), r"no UTF-8 text \(in line 2\); save it as UTF-8"),
        ("кот".encode("cp1251"), "no UTF-8 text"),
        (TEXT.encode("utf-16-le"), "no UTF-8 text"),
        ("a cat".encode("utf-16-be"), r"no UTF-8 text \(it has zeros"),
        (TEXT.encode("utf-32"), "no UTF-8 text"),
        (codecs.BOM_UTF16_LE + b"odd", "no UTF-8 text"),
    ],
)
def test_other_encodings_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(TextError, match=rf"a\.txt is {words}"):
        read_text(tmp_path / "a.txt")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for name, words in (
        ("folder", "is no file"),
        ("pipe", "is no file"),
        ("link", "cannot be read"),
        ("x", "No such"),
    ):
        with pytest.raises(TextError, match=words):
            read_text(tmp_path / name)


def test_configuration_files_may_have_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "rex.toml"
    text = 'instance_data_dir = "photos"\nconcept = "rex"\nclass_word = "dog"\n'
    for encoding in ("utf-8-sig", "utf-16"):
        file.write_text(text, encoding=encoding)
        assert TrainingConfig.from_file(file).concept == "rex"
    file.write_text("[doctor]\n", encoding="utf-8-sig")
    assert read_config(file, {"doctor": {}}) == {"doctor": {}}
