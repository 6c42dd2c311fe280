"""A small reader of the text that A1111 puts into pictures, written from its description alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

from PIL import Image


_PAIR = re.compile(r'(\w[\w /-]*): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)')
_USER_COMMENT, _EXIF = 0x9286, 0x8769


def parsed(text: str) -> dict[str, str]:
    """Prompt, negative prompt and settings: the last line holds the settings, a marked line starts the negative."""
    *lines, settings = text.split("\n")
    pairs = {name: json.loads(value) if value.startswith('"') else value for name, value in _PAIR.findall(settings)}
    marks = [number for number, line in enumerate(lines) if line.startswith("Negative prompt: ")]
    end = marks[0] if marks else len(lines)
    negative = "\n".join(lines[end:]).removeprefix("Negative prompt: ")
    return {"prompt": "\n".join(lines[:end]), "negative": negative, **pairs}


def text_of(path: Path) -> str:
    """The text as other programs find it: ``parameters`` of a PNG, the user's comment of another."""
    with Image.open(path) as picture:
        if picture.format == "PNG":
            return picture.text["parameters"]
        comment = picture.getexif().get_ifd(_EXIF)[_USER_COMMENT]
    assert comment.startswith(b"UNICODE\0")
    return comment[8:].decode("utf-16-be")
