"""What a report says of a fusion, in numbers, as a table and as a picture."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from diffusers_mixofshow.fusion.report import FusionReport, _peak_memory


NAMES = ("<rex>", "<kit>", "<zoe>", "<tom>")
LAYERS: dict[str, list[float | None]] = {  # site to the residual of each source
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": [0.0, 1.0, 0.25, None],
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": [0.5, 1.0, 0.125, 0.75],
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": [0.25, 1.5, 0.5, 0.75],
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [0.75, 1.5, 0.5, None],
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": [0.1, 0.2, 0.3, 0.4],
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2": [0.9, 0.8, 0.7, 0.6],
}
FUSED = [0.4164, 0.99, 0.95, None]
DATA: dict[str, Any] = {
    "residuals": {
        "mean": {name: {"average": 0.5, "fused": value} for name, value in zip(NAMES, FUSED, strict=True)},
        "layers": {
            site: {name: {"average": 1.0, "fused": value} for name, value in zip(NAMES, row, strict=True)}
            for site, row in LAYERS.items()
        },
    },
    "overlaps": {"<rex> <kit>": 0.125, "<rex> <zoe>": 0.5, "<kit> <zoe>": 0.25, "<rex> <tom>": 0.0625},
}


@pytest.fixture
def report() -> FusionReport:
    return FusionReport(DATA)


def test_those_that_are_hardly_kept_are_named_the_worst_first(report: FusionReport) -> None:
    assert report.poor == ("<kit>", "<zoe>")  # the limit itself counts; what is not known does not
    assert [told.split(" is hardly kept ")[0] for told in report.warnings] == ["<kit>", "<zoe>"]
    assert all(f"mean residual {value}," in told for told, value in zip(report.warnings, (0.99, 0.95), strict=True))


def test_the_largest_overlaps_come_first(report: FusionReport) -> None:
    assert report.conflicts == (
        ("<rex>", "<zoe>", 0.5),
        ("<kit>", "<zoe>", 0.25),
        ("<rex>", "<kit>", 0.125),
        ("<rex>", "<tom>", 0.0625),
    )


def printed(report: FusionReport) -> list[list[str]]:
    """The cells of every line."""
    console = Console(record=True, width=200, file=StringIO())
    report.print(console)
    lines = console.export_text().replace("┃", "│").splitlines()
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines]


def test_the_table_has_a_mean_for_each_kind_of_layer(report: FusionReport) -> None:
    rows = printed(report)
    assert ["concept", "averaged", "fused", "cross k v", "cross q out", "other", "self", "text"] in rows
    assert ["<rex>", "0.500", "0.416", "0.500", "0.100", "0.900", "0.500", "0.000"] in rows
    assert ["<tom>", "0.500", "-", "0.750", "0.400", "0.600", "0.750", "-"] in rows
    (pairs,) = [row[0] for row in rows if "Largest overlaps" in row[0]]
    assert pairs.endswith("(0 to 1): <rex> and <zoe> 0.50, <kit> and <zoe> 0.25, <rex> and <kit> 0.12")


def test_one_concept_has_no_pairs_to_print() -> None:
    assert not any("Largest overlaps" in row[0] for row in printed(FusionReport({**DATA, "overlaps": {}})))


def test_the_picture_has_a_cell_for_each_layer_and_source(report: FusionReport, tmp_path: Path) -> None:
    """White is kept, red is lost, grey where a source leaves the layer alone; cells of 12 pixels, 14 apart."""
    path = report.heat_map(tmp_path / "map.png")
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    left, top = 8 + 7 * len("<rex>"), 8
    assert (path, picture.size) == (tmp_path / "map.png", (left + 14 * len(LAYERS) + 8, top + 14 * len(NAMES) + 8))
    for column, values in enumerate(LAYERS.values()):
        for row, value in enumerate(values):
            shade = 200 if value is None else round(255 * (1 - min(1.0, value)))
            wanted = (200 if value is None else 255, shade, shade)
            corner = (left + 14 * column, top + 14 * row)
            assert {picture.getpixel((corner[0] + x, corner[1] + y)) for x in (0, 6, 12) for y in (0, 6, 12)} == {
                wanted
            }
            between = {picture.getpixel((corner[0] + 13, corner[1])), picture.getpixel((corner[0], corner[1] + 13))}
            assert between == {(255, 255, 255)}
    for row in range(len(NAMES)):  # a dark name beside each row
        beside = [picture.getpixel((x, top + 14 * row + y)) for x in range(4, left - 1) for y in range(12)]
        assert min(map(sum, beside)) < 200
    assert picture.crop((0, 0, 4, picture.height)).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize(("system", "unit"), [("darwin", 1), ("freebsd14", 2**10)])
def test_the_peak_of_memory_is_told_in_mib_whatever_unit_the_system_counts_in(
    monkeypatch: pytest.MonkeyPatch, system: str, unit: int
) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("diffusers_mixofshow.fusion.report.sys.platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=300 * 2**20 // unit))
    assert _peak_memory()["peak_memory_mib"] == 300
