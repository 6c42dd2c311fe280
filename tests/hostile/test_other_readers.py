"""The other files that strangers hand over: statistics, records of fused packs, layouts, pipelines, cards, pages."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.card import refresh_text
from diffusers_mixofshow.edlora.merged import has_concepts
from diffusers_mixofshow.errors import EDLoRANotFoundError, FusionError, RegionError
from diffusers_mixofshow.fusion.pack import FusedPack
from diffusers_mixofshow.fusion.published import SourceStatistics
from diffusers_mixofshow.fusion.statistics import ConceptStatistics
from diffusers_mixofshow.regions import Layout


# --- statistics ---


def statistics_file(folder, *, max_bytes=None):
    concept = ConceptStatistics()
    concept.add("one", torch.randn(50, 8))
    made = SourceStatistics(digest="ab", base_model="tiny", recording={}, concepts={"<rex>": concept})
    return made.save(folder / "x.safetensors", max_bytes=max_bytes)


def rewritten(path, *, header=None, tensors=None):
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    held = load_file(path)
    values = json.loads(metadata["edlora_statistics"])
    if header is not None:
        values = header(values)
    if tensors is not None:
        held = {name: tensors(name, value).contiguous() for name, value in held.items()}
    text = values if isinstance(values, str) else json.dumps(values)
    save_file(held, path, metadata={**metadata, "edlora_statistics": text})


@pytest.mark.parametrize(
    "header",
    [
        lambda h: "[" * 100_000,
        lambda h: "x" * (5 * 2**20),
        lambda h: "[]",
        lambda h: h | {"format_version": 2},
        lambda h: h | {"format_version": True},
        lambda h: h | {"format_version": "\x1b[2J"},
        lambda h: h | {"concepts": []},
        lambda h: h | {"concepts": {"<rex>": []}},
        lambda h: h | {"concepts": {"<rex>": {"one": {"fit": {"tokens": 10**400, "tail": 0, "energy": 1}}}}},
        lambda h: json.dumps(h).replace('"energy": 1.0', '"energy": NaN'),
        lambda h: json.dumps(h).replace('"energy": 1.0', '"energy": 1e999'),
        lambda h: h | {"concepts": {**h["concepts"], "<tom>": h["concepts"]["<rex>"]}},
    ],
)
def test_statistics_with_a_broken_header(tmp_path, header):
    path = statistics_file(tmp_path)
    rewritten(path, header=header)
    with pytest.raises(FusionError) as caught:
        SourceStatistics.load(path)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("max_bytes", [None, 10**6])
@pytest.mark.parametrize("change", [lambda t: t.unsqueeze(0), lambda t: t[:-1], lambda t: t.flatten()[:1]])
def test_statistics_of_another_shape(tmp_path, max_bytes, change):
    path = statistics_file(tmp_path, max_bytes=max_bytes)
    part = "gram" if max_bytes is None else "rows"
    rewritten(path, tensors=lambda name, value: change(value) if name.endswith(part) else value)
    with pytest.raises(FusionError, match="tensors of another shape"):
        SourceStatistics.load(path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.mkdir(), lambda path: path.write_bytes(b"")])
def test_statistics_that_are_no_file(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(FusionError, match="cannot be read as fusion statistics"):
        SourceStatistics.load(tmp_path / "x")


# --- what a pack says of its sources ---

SOURCE = {"concepts": ["<rex>"], "weight": 1.0, "scale": 1.0, "origin": "", "digest": "0" * 64}
RECORD = {"method": "closed-form", "ridge": 0.01, "max_rank": None, "sources": [SOURCE]}


@pytest.mark.parametrize(
    "record",
    [
        {},
        {**RECORD, "method": "rm -rf"},
        {**RECORD, "method": ["closed-form"]},
        {**RECORD, "ridge": "large"},
        {**RECORD, "max_rank": "x"},
        {**RECORD, "sources": {}},
        {**RECORD, "sources": [3]},
        *(
            {**RECORD, "sources": [{**SOURCE, "concepts": [name]}]}
            for name in ("../../etc", "/etc", "..", "", "a/b", 3)
        ),
        *({**RECORD, "sources": [{**SOURCE, key: None}]} for key in SOURCE),
        {**RECORD, "sources": [{**SOURCE, "weight": 1e400}]},
        {**RECORD, "sources": [{**SOURCE, "scale": float(10**300)}]},
    ],
)
def test_a_record_that_cannot_be_used(pack, tmp_path, record):
    text = json.dumps(record).replace("Infinity", "1e999")
    try:
        dataclasses.replace(pack, training={"fusion": json.loads(text)}).save_pretrained(tmp_path)
    except ValueError:
        return  # what is not finite is not even written
    with pytest.raises(FusionError, match="record of its fusion cannot be used"):
        FusedPack.from_pretrained(tmp_path)
    assert isinstance(EDLoRA.from_pretrained(tmp_path), EDLoRA)


@pytest.mark.parametrize("origin", ["/etc/passwd", "../secret", "file:///etc", "..", "~/x"])
def test_a_path_in_a_record_is_not_followed(pack, tmp_path, origin, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = {**RECORD, "sources": [{**SOURCE, "origin": origin}]}
    dataclasses.replace(pack, training={"fusion": record}).save_pretrained(tmp_path / "pack")
    with pytest.raises(FusionError, match="which cannot be found"):
        FusedPack.from_pretrained(tmp_path / "pack")


def test_a_carried_source_that_is_a_link_out_of_the_pack_is_not_read(pack, tmp_path):
    dataclasses.replace(pack, training={"fusion": RECORD}).save_pretrained(tmp_path / "pack")
    pack.save_pretrained(tmp_path / "private")
    (tmp_path / "pack" / "sources").mkdir()
    (tmp_path / "pack" / "sources" / "rex").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match="not followed"):
        FusedPack.from_pretrained(tmp_path / "pack")


# --- layouts ---


@pytest.mark.parametrize("mask", ["../private.png", "/etc/passwd", "pipe", "link.png", "folder", "bomb.png"])
def test_a_layout_follows_no_path_out_of_its_folder(tmp_path, mask, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    folder = tmp_path / "layout"
    (folder / "folder").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "private.png")
    Image.new("L", (40, 40)).save(folder / "bomb.png")
    os.mkfifo(folder / "pipe")
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    content = {"format": "mixofshow-layout", "version": 1, "regions": [{"prompt": "a", "mask": mask}]}
    (folder / "x.json").write_text(json.dumps(content))
    with pytest.raises(RegionError, match="mask of region 0 cannot be read"):
        Layout.load(folder / "x.json")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format":' * 50_000, "9" * 5000])
def test_a_layout_that_is_no_json(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RegionError):
        Layout.load(tmp_path / "x.json")


@pytest.mark.parametrize("key", ["box", "weight", "feather", "order", "guidance_scale", "start"])
def test_a_layout_with_numbers_beyond_all_floats(tmp_path, key):
    number = 10**400
    region = {"prompt": "a", "box": [0, 0, 1, 1]} | {key: [0, 0, number, 1] if key == "box" else number}
    content = {"format": "mixofshow-layout", "version": 1, "regions": [region]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(RegionError, match=f"its {key} "):
        Layout.load(tmp_path / "x.json")


def test_a_layout_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(RegionError, match="cannot be read"):
        Layout.load(tmp_path / "x.json")


# --- pipelines and cards ---


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, '{"_mixofshow_concepts": 0}', "\x00"])
def test_an_index_of_another_kind_means_no_concepts(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    assert has_concepts(tmp_path) is False


@pytest.mark.parametrize(
    "existing", ["---\n" * 1000, "---\n&a [*a]\n---\n", "\x00", "---\n!!python/object:os.x {}\n---\n"]
)
def test_a_card_of_another_kind_is_refreshed_or_left_but_never_in_the_way(pack, existing):
    assert refresh_text(existing, pack._card("here", False, {}, None))


def test_what_is_not_there_is_not_there():
    with pytest.raises(EDLoRANotFoundError):
        FusedPack.from_pretrained("/nowhere/at/all")
