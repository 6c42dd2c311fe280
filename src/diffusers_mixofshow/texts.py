"""Text files as editors of all systems leave them."""

from __future__ import annotations

import codecs
from pathlib import Path

from diffusers_mixofshow.errors import TextError


_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
"""Byte order mark at the start of a file to its encoding."""


def read_text(path: Path) -> str:
    r"""Read UTF-8, or UTF-16 with a byte order mark; every line ends in ``\n``.

    Args:
        path: The file.

    Raises:
        TextError: If it cannot be read, or is in another encoding, which cannot be recognised reliably.
    """
    if path.exists() and not path.is_file():
        raise TextError(f"{path.name} is no file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TextError(f"{path.name} cannot be read ({error.strerror or error})") from error
    mark = next((mark for mark in _MARKS if content.startswith(mark)), b"")
    try:
        text = content.removeprefix(mark).decode(_MARKS.get(mark, "utf-8"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TextError(f"{path.name} is no UTF-8 text (in line {line}); save it as UTF-8") from error
    if "\0" in text:
        raise TextError(f"{path.name} is no UTF-8 text (it has zeros, as UTF-16 does); save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")
