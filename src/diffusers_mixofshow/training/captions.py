"""Read captions of photos from text and metadata files, put the concept's name into them, and shuffle their tags."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from diffusers_mixofshow.concepts import SLOT, Concept, mentions_concept, split_prompt
from diffusers_mixofshow.errors import ConceptError, TextError, TrainingDataError
from diffusers_mixofshow.texts import read_text


TEMPLATES = (
    "a photo of a <TOK>",
    "a picture of a <TOK>",
    "a close-up photo of a <TOK>",
    "a good photo of a <TOK>",
    "a rendition of a <TOK>",
)
"""Default captions of photos that have none, after textual inversion (arXiv:2208.01618, supplementary)."""

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
"""Names of the metadata file in the Hub's imagefolder layout."""

FILE_COLUMN, MASK_COLUMN = "file_name", "mask_file_name"

_MOST_DEFECTS = 20
"""How many wrong lines of a metadata file an error lists before it says "and N more"."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a folder's metadata file says.

    Args:
        file: Its name; empty if there is none.
        captions: A photo's path, relative to the folder, to its captions.
        masks: A photo's path to its mask's path, both relative to the folder.
        defects: What is wrong with the file, one text each.
    """

    file: str = ""
    captions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    masks: Mapping[str, str] = field(default_factory=dict)
    defects: Sequence[str] = ()


def read_metadata(folder: Path, *, column: str | None) -> Metadata:
    """Read ``metadata.jsonl`` or ``metadata.csv``: for each photo its ``file_name``, captions and ``mask_file_name``.

    Args:
        folder: The folder of photos; it need not hold a metadata file.
        column: The column of captions, in JSON a text or a list of texts; None ignores captions.
    """
    present = sorted(path.name for path in folder.iterdir() if path.name.lower() in METADATA_FILES)
    if not present:
        return Metadata()
    if len(present) > 1:
        return Metadata(defects=(f"{' and '.join(present)} are both there; keep one",))
    try:
        text = read_text(folder / present[0])
    except TextError as error:
        return Metadata(defects=(str(error),))
    rows, defects = (_read_json_rows if present[0].lower().endswith(".jsonl") else _read_csv_rows)(text)
    captions: dict[str, list[str]] = {}
    masks: dict[str, str] = {}
    for line, row in rows:
        try:
            name, mask, texts = _read_row(row, column)
        except TrainingDataError as error:
            defects.append(f"line {line}: {error}")
            continue
        captions.setdefault(name, []).extend(texts)
        if mask is not None:
            masks[name] = mask
    more = [f"and {len(defects) - _MOST_DEFECTS} more"] if len(defects) > _MOST_DEFECTS else []
    return Metadata(
        file=present[0],
        captions=captions,
        masks=masks,
        defects=[f"{present[0]}, {defect}" for defect in (*defects[:_MOST_DEFECTS], *more)],
    )


def read_caption_file(path: Path) -> list[str]:
    """Read the captions in ``NAME.txt``, one a line.

    Raises:
        TextError: If the file is no text.
        TrainingDataError: If it has no caption.
    """
    lines = [line.strip() for line in read_text(path).split("\n")]
    if not any(lines):
        raise TrainingDataError(f"{path.name} is empty; write a caption such as 'a photo of a <TOK>' or delete it")
    return [line for line in lines if line]


def read_description(path: Path, *, column: str) -> list[str]:
    """Read the captions in ``NAME.json``, an object such as ``{"caption": "a <TOK>"}``; empty if it has none.

    Args:
        path: The file.
        column: The key of captions; if it is missing, ``caption`` and then ``text`` are tried.

    Raises:
        TextError: If the file is no text.
        TrainingDataError: If the key's value is no text or list of texts.
    """
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError):
        return []
    keys = [key for key in (column, "caption", "text") if isinstance(content, dict) and content.get(key)]
    try:
        return _read_texts(content, keys[0]) if keys else []
    except TrainingDataError as error:
        raise TrainingDataError(f"{path.name}: {error}") from error


def name_concept(texts: Iterable[str], concept: Concept, *, source: str) -> tuple[str, ...]:
    """Replace ``<TOK>`` by the concept's placeholder, and check that each caption names the concept.

    Args:
        texts: The captions.
        concept: The concept.
        source: Where errors say that the captions are from.

    Raises:
        TrainingDataError: If a caption names another concept, or none.
    """
    captions = tuple(text.replace(SLOT, concept.placeholder) for text in texts)
    for caption in captions:
        if any("\ud800" <= character <= "\udfff" for character in caption):
            raise TrainingDataError(f"{source}: {caption!r} has half of a character (a surrogate); write it anew")
        try:
            split_prompt(caption, [concept])
        except ConceptError as error:
            unknown = str(error).partition(". ")[0]
            raise TrainingDataError(
                f"{source}: {unknown}; the concept of this training is {concept.placeholder}, or {SLOT}"
            ) from error
        if not mentions_concept(caption, [concept]):
            raise TrainingDataError(
                f"{source}: {caption!r} does not name the concept; write {SLOT} or {concept.placeholder}"
            )
    return captions


def shuffle_tags(captions: Sequence[str], count: int, *, seed: int) -> tuple[str, ...]:
    """Make variants of captions with their comma-separated tags in other orders; the first tag stays first.

    The first tag most often names the concept.

    Args:
        captions: Captions of one photo.
        count: How many random orders of each caption, at most; 0 returns the captions unchanged.
        seed: Seed of the orders.

    Returns:
        As many variants of each caption, a caption without tags repeated, so that none is trained more often.
    """
    if count == 0:
        return tuple(captions)
    orders = [_order_tags(caption, count, random.Random(f"{seed} {caption}")) for caption in captions]
    most = max(map(len, orders))
    return tuple(variants[place % len(variants)] for variants in orders for place in range(most))


def _order_tags(caption: str, count: int, randomness: random.Random) -> list[str]:
    first, *others = (tag.strip() for tag in caption.split(","))
    if math.factorial(len(others)) <= count:
        found = set(itertools.permutations(others))
    else:
        found = set()
        for _ in range(8 * count):  # not until there are enough: repeated tags may have fewer distinct orders
            found.add(tuple(randomness.sample(others, len(others))))
            if len(found) == count:
                break
    return [", ".join((first, *order)) for order in sorted(found)]


def _read_json_rows(text: str) -> tuple[list[tuple[int, Mapping[str, Any]]], list[str]]:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    defects = []
    if text.lstrip().startswith("["):
        return [], ['expected one object a line, such as {"file_name": ..., "text": ...}, not a list of them']
    for line, content in enumerate(text.split("\n"), start=1):  # splitlines() would split at U+2028 inside a JSON text
        if not content.strip():
            continue
        try:
            row = json.loads(content, object_pairs_hook=_refuse_repeated_keys)
        except (ValueError, RecursionError) as error:
            defects.append(f"line {line}: no JSON ({error})")
            continue
        if isinstance(row, dict):
            rows.append((line, row))
        else:
            defects.append(f'line {line}: expected an object such as {{"file_name": ..., "text": ...}}')
    return rows, defects


def _refuse_repeated_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; refuse a repeated key, of which Python would silently take the last value."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(map(repr, twice))} more than once")
    return dict(pairs)


def _read_csv_rows(text: str) -> tuple[list[tuple[int, Mapping[str, Any]]], list[str]]:
    """Read rows as column name to cell, without empty cells; the first line decides about the separator."""
    reader = csv.reader(io.StringIO(text), strict=True, skipinitialspace=True, delimiter=_find_separator(text))
    rows: list[tuple[int, Mapping[str, Any]]] = []
    defects: list[str] = []
    columns: list[str] = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            while cells and not cells[-1]:
                cells.pop()
            if not cells:
                continue
            if not columns:
                columns = cells
                twice = sorted({name for name in columns if columns.count(name) > 1})
                defects += [f"line 1: there are several columns {name!r}" for name in twice]
            elif len(cells) > len(columns):
                defects.append(
                    f"line {reader.line_num} has {len(cells)} cells, the first line {len(columns)}; put captions "
                    f"with {reader.dialect.delimiter!r} into quotes"
                )
            else:
                given = zip(columns, cells, strict=False)  # a row may end before the last columns
                rows.append((reader.line_num, {name: cell for name, cell in given if cell}))
    except csv.Error as error:
        return [], [f"no CSV ({error})"]
    return rows, defects


def _find_separator(text: str) -> str:
    """Separator of the header's columns; spreadsheets write semicolons in languages with a decimal comma."""
    header = text.lstrip().partition("\n")[0]
    return next(
        (mark for mark in ",;\t" if FILE_COLUMN in [name.strip(' "') for name in header.split(mark)]),
        ",",
    )


def _read_row(row: Mapping[str, Any], column: str | None) -> tuple[str, str | None, list[str]]:
    """A row's photo, mask and captions."""
    name = _read_path(row, FILE_COLUMN)
    mask = _read_path(row, MASK_COLUMN) if row.get(MASK_COLUMN) else None
    return name, mask, [] if column is None else _read_texts(row, column)


def _read_texts(row: Mapping[str, Any], column: str) -> list[str]:
    """Read the captions in a row."""
    if column not in row:
        others = ", ".join(str(other) for other in row if other not in (FILE_COLUMN, MASK_COLUMN)) or "no other column"
        raise TrainingDataError(
            f"there is no {column!r} (there is {others}); name the captions by caption_column, or set it to none"
        )
    texts = row[column] if isinstance(row[column], list) else [row[column]]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise TrainingDataError(f"{column!r} is {row[column]!r}, expected a text or a list of texts")
    return [text.strip() for text in texts]


def _read_path(row: Mapping[str, Any], column: str) -> str:
    """Read a relative path, and refuse one that leaves the folder by the rules of Windows or of other systems."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        others = ", ".join(map(str, row)) or "nothing"
        raise TrainingDataError(f"there is no {column!r} (there is {others})")
    posix, windows = PurePosixPath(value.strip()), PureWindowsPath(value.strip())
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise TrainingDataError(f"{column!r} is {value!r}, which leaves the folder; expected a path inside it")
    return posix.as_posix()
