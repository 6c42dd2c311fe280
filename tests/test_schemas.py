"""The JSON schemas of the documentation: files that are written, and those of every release, fit; others do not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from PIL import Image
from safetensors import safe_open

from diffusers_mixofshow.concepts import KINDS
from diffusers_mixofshow.edlora.header import FORMAT_VERSION, ONE_ENCODER
from diffusers_mixofshow.fusion import published
from diffusers_mixofshow.regions import Layout, Region
from diffusers_mixofshow.regions.layout import FORMAT, VERSION


SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"
FILES = Path(__file__).parent / "compatibility" / "files"


def schema(name: str) -> Draft202012Validator:
    content = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(content)
    return Draft202012Validator(content)


def header(path: Path, key: str) -> Any:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[key])


def test_every_schema_is_named_on_the_page_of_formats() -> None:
    page = (SCHEMAS.parent / "formats.md").read_text(encoding="utf-8")
    assert all(f"(schemas/{path.name})" in page for path in SCHEMAS.iterdir())
    assert len([*SCHEMAS.iterdir()]) == 3


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("format-1/edlora.safetensors", "edlora"),
        ("format-1/fused.safetensors", "edlora"),
        ("format-2/edlora.safetensors", "edlora"),
        ("format-1/edlora.statistics.safetensors", "edlora_statistics"),
    ],
)
def test_files_of_every_release_fit(file: str, key: str) -> None:
    schema(key).validate(header(FILES / file, key))


def test_what_is_written_today_fits(pack: Any, tmp_path: Path) -> None:
    schema("edlora").validate(header(pack.save_pretrained(tmp_path / "pack"), "edlora"))
    layout = Layout(prompt="two", negative_prompt="none", width=64, height=64)
    layout = layout.with_region("a dog", box=(0, 0, 32, 64), feather=0.1, order=1, start=0.5)
    layout = layout.with_region("a vase", box=(32, 0, 64, 64), rounding="inward", end=0.5, control_scale=0.5)
    layout = layout.with_region("a cat", mask=Image.new("L", (8, 8), 255), negative_prompt="dog", guidance_scale=2.0)
    layout = layout.with_region("a tree", box=(0, 0, 8, 8), name="the tree")
    schema("layout").validate(json.loads(layout.save(tmp_path / "layout.json").read_text(encoding="utf-8")))
    schema("layout").validate(json.loads((FILES / "format-1" / "layout.json").read_text(encoding="utf-8")))
    schema("layout").validate({"format": FORMAT, "version": VERSION})


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 3},
        {"format_version": "1"},
        {"concepts": {}},
        {"concepts": [{"placeholder": "<rex>", "tokens": ["<rex1>"], "class_word": "dog"}]},
        {"concepts": [{"placeholder": "rex", "tokens": ["<rex1>"], "class_word": "dog", "kind": "pet"}]},
        {"concepts": [{"placeholder": "<rex>", "tokens": [], "class_word": "dog", "kind": "pet"}]},
        {"concepts": [{"placeholder": "<rex>", "tokens": ["<rex1>"], "class_word": " ", "kind": "pet"}]},
        {"concepts": [{"placeholder": "<rex>", "tokens": ["<rex1>"], "class_word": "dog", "kind": "animal"}]},
        {"base_model": None},
        {"layers": "all"},
        {"lora": {"unet.x": {"rank": 4}}},
        {"lora": {"unet.x": {"rank": 4.5, "alpha": 4}}},
        {"training": []},
    ],
)
def test_what_is_refused_does_not_fit(change: dict[str, Any]) -> None:
    values = header(FILES / "format-1" / "edlora.safetensors", "edlora")
    assert not schema("edlora").is_valid(values | change)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"colour": "red"},
        {"regions": [{"prompt": "a", "box": [0, 0, 1]}]},
        {"regions": [{"prompt": "a"}]},
        {"regions": [{"prompt": "a", "box": [0, 0, 1, 1], "mask": "a.png"}]},
        {"regions": [{"prompt": "a", "box": [0, 0, 1, 1], "strength": 1}]},
    ],
)
def test_a_layout_that_is_refused_does_not_fit(change: dict[str, Any]) -> None:
    assert not schema("layout").is_valid({"format": FORMAT, "version": VERSION} | change)


def test_the_schemas_know_what_the_code_knows() -> None:
    edlora, layout = schema("edlora").schema, schema("layout").schema
    statistics = schema("edlora_statistics").schema
    assert statistics["properties"]["format_version"]["const"] == published.FORMAT_VERSION
    assert edlora["properties"]["format_version"]["enum"] == [*range(ONE_ENCODER, FORMAT_VERSION + 1)]
    assert tuple(edlora["properties"]["concepts"]["items"]["properties"]["kind"]["enum"]) == KINDS
    assert {*layout["$defs"]["region"]["properties"]} == {field.name for field in dataclasses.fields(Region)}
