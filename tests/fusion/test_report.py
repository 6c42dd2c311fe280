"""What a report says of a fusion, in numbers, as a table and as a picture."""

from __future__ import annotations

import itertools
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION as FAMILY
from diffusers_mixofshow.fusion import heat_map
from diffusers_mixofshow.fusion.heat_map import Column
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


@pytest.mark.parametrize(
    "data",
    [
        {"residuals": [1], "overlaps": [2], "layers": 3, "max_rank": 4},
        {"residuals": {"mean": {"a": 1, "b": {"fused": "x"}}, "layers": {"unet.x": 1}}},
        {"residuals": {"mean": {"a": {"average": 0.5, "fused": 10**400}}, "layers": {"nowhere": {"b": {"fused": 1}}}}},
        {"overlaps": {"a": 1, "a b": "x", "a b c": None}},
        {"layers": {"unet.x": {"energy_kept": "x"}, "unet.y": 1}, "max_rank": 2},
    ],
)
def test_what_has_a_wrong_form_in_a_strangers_record_is_skipped(data: dict[str, Any], tmp_path: Path) -> None:
    report = FusionReport(data)
    report.print(Console(file=StringIO()))
    assert (report.poor, report.warnings, report.told_energy) == ((), (), "")
    assert all(isinstance(value, float) for *_, value in report.conflicts)
    if data.get("residuals") != [1] and "residuals" in data:
        assert report.heat_map(tmp_path / "map.png").is_file()


def test_the_table_has_a_mean_for_each_kind_of_layer(report: FusionReport) -> None:
    rows = printed(report)
    kinds = ("cross k v", "cross q out", "other", "self", "text")
    assert ["concept", "averaged", "fused", *(f"fused: {kind}" for kind in kinds)] in rows
    assert ["<rex>", "0.500", "0.416", "0.500", "0.100", "0.900", "0.500", "0.000"] in rows
    assert ["<tom>", "0.500", "-", "0.750", "0.400", "0.600", "0.750", "-"] in rows
    (pairs,) = [row[0] for row in rows if "Largest overlaps" in row[0]]
    assert pairs.endswith("(0 to 1): <rex> and <zoe> 0.50, <kit> and <zoe> 0.25, <rex> and <kit> 0.12")


def test_one_concept_has_no_pairs_to_print() -> None:
    assert not any("Largest overlaps" in row[0] for row in printed(FusionReport({**DATA, "overlaps": {}})))


def of_a_transformer(names: tuple[str, ...], sites: tuple[str, ...]) -> FusionReport:
    one = {"average": 0.75, "fused": 0.5}
    residuals = {"mean": dict.fromkeys(names, one), "layers": {site: dict.fromkeys(names, one) for site in sites}}
    return FusionReport({"residuals": residuals, "overlaps": {" ".join(names): 0.85}})


def test_how_much_is_kept_is_said_only_where_it_was_measured(report: FusionReport) -> None:
    """Of concepts on the U-Net of Stable Diffusion, not of plain LoRAs, nor of other families."""
    measured, general = "Around 0.6, concepts of 'mixofshow demo' keep nearly all", "By itself it says little: measure"
    assert measured in report.meaning
    assert general not in report.meaning
    unet = tuple(LAYERS)[1:]
    transformer = ("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_k")
    for other in (
        of_a_transformer(("bobo", "kiki"), transformer),
        of_a_transformer(("bobo", "kiki"), unet),
        of_a_transformer(("<bobo>", "kiki"), unet),
        of_a_transformer(("<bobo>", "<kiki>"), ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", *unet)),
    ):
        assert measured not in other.meaning
        assert general in other.meaning
        assert "about features, not identity" in other.meaning


def test_what_a_smaller_rank_loses_is_one_line(report: FusionReport) -> None:
    """Also where nothing was measured; of the layers that were reduced."""
    layers = {"a": {"energy_kept": 0.9}, "b": {"energy_kept": 0.5, "ridge": 0.1}, "c": {"ridge": 0.1}}
    told = (
        "Reduced to rank 4, 2 layers keep 70.0% of the energy of their updates (sum of the squares) in the mean, "
        "50.0% at least (b)."
    )
    for data in (DATA, {}):
        lines = [row[0] for row in printed(FusionReport({**data, "max_rank": 4, "layers": layers}))]
        assert "".join(lines[-2:]).replace("  ", " ").endswith(told)
    for data in ({"max_rank": None, "layers": layers}, {"max_rank": 4, "layers": {"c": {}}}, {}):
        assert printed(FusionReport(data)) == []


def test_a_kind_of_layer_that_is_the_only_one_has_no_column() -> None:
    sites = ("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_k")
    rows = printed(of_a_transformer(("bobo", "kiki"), sites))
    assert ["concept", "averaged", "fused"] in rows
    assert ["bobo", "0.750", "0.500"] in rows


def test_what_an_overlap_is_stands_before_the_largest(report: FusionReport) -> None:
    lines = [row[0] for row in printed(report)]
    (place,) = (number for number, line in enumerate(lines) if line.startswith("Largest overlaps"))
    assert "one output has to serve both" in lines[place - 1]


def test_the_picture_has_a_cell_for_each_layer_and_source(report: FusionReport, tmp_path: Path) -> None:
    """White is kept, red is lost, grey where a source leaves the layer alone; cells of 23 pixels, 24 apart."""
    path = report.heat_map(tmp_path / "map.png")
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    kinds = [FAMILY.group_of(site) for site in LAYERS]
    cells = sorted(zip(kinds, LAYERS.items(), strict=True), key=lambda cell: cell[0])
    columns = [Column(site, kind, values) for kind, (site, values) in cells]
    left, top = heat_map.find_left(NAMES), heat_map.TOP
    places = heat_map.place_columns(columns, left)
    assert path == tmp_path / "map.png"
    assert picture.width >= max(places) + 24
    for column, place in zip(columns, places, strict=True):
        for row, value in enumerate(column.values):
            shade = 200 if value is None else round(255 * (1 - min(1.0, value)))
            wanted = (200 if value is None else 255, shade, shade)
            corner = (place, top + 24 * row)
            assert {picture.getpixel((corner[0] + x, corner[1] + y)) for x in (0, 6, 22) for y in (0, 6, 22)} == {
                wanted
            }
            between = {picture.getpixel((corner[0] + 23, corner[1])), picture.getpixel((corner[0], corner[1] + 23))}
            assert between == {(225, 225, 225)}
    for row in range(len(NAMES)):  # a dark name beside each row
        beside = [picture.getpixel((x, top + 24 * row + y)) for x in range(4, left - 1) for y in range(24)]
        assert min(map(sum, beside)) < 200
    assert picture.crop((0, 0, 4, picture.height)).getextrema() == ((255, 255),) * 3
    below = top + 24 * len(NAMES) + 2
    for place in places:  # the name of each layer
        assert is_written_on(picture, (place, below, place + 23, picture.height))
    for kind in set(kinds):  # the kind above its first layer
        first = min(place for place, column in zip(places, columns, strict=True) if column.group == kind)
        assert is_written_on(picture, (first, top - 20, first + 23, top - 2))
    shown = {colour for _, colour in picture.crop((0, 24, picture.width, 50)).getcolors(9999)}
    assert {(255, 255, 255), (255, 128, 128), (255, 0, 0), (200, 200, 200)} <= shown  # the legend


def is_written_on(picture: Image.Image, box: tuple[int, int, int, int]) -> bool:
    return picture.crop(box).convert("L").getextrema()[0] < 100


@pytest.mark.parametrize(("columns", "width"), [(60, 24), (61, 14), (494, 14)])
def test_many_layers_have_narrow_cells_and_no_label_runs_into_the_next(columns: int, width: int) -> None:
    kinds = ["feed-forward" if number == 7 else f"kind {number // 20}" for number in range(columns)]
    layers = [Column(f"layer.{number}", kind, [0.5]) for number, kind in enumerate(sorted(kinds))]
    places = heat_map.place_columns(layers, 50)
    starts = {layer.group: place for place, layer in reversed([*zip(places, layers, strict=True)])}
    assert places[0] == 50
    assert min(after - before for before, after in itertools.pairwise(places)) == width
    assert starts["kind 0"] - starts["feed-forward"] > 60
    picture = heat_map.draw_heat_map(["rex"], layers)
    assert picture.width > max(places) - 50 + width


def test_a_layer_that_no_source_changes_is_grey(tmp_path: Path) -> None:
    """Such as one whose output the model does not use: nothing is lost there, but nothing kept either."""
    sites = ("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_k")
    report = of_a_transformer(("bobo", "kiki"), sites)
    nothing = {"average": 0.0, "fused": 0.0}
    report.data["residuals"]["layers"][sites[1]] = dict.fromkeys(("bobo", "kiki"), nothing)
    with Image.open(report.heat_map(tmp_path / "map.png")) as picture:
        left = heat_map.find_left(("bobo", "kiki"))
        row = [picture.getpixel((left + 24 * column + 9, heat_map.TOP + 9)) for column in range(2)]
    assert row == [(255, 128, 128), (200, 200, 200)]


@pytest.mark.parametrize(("system", "unit"), [("darwin", 1), ("freebsd14", 2**10)])
def test_the_peak_of_memory_is_told_in_mib_whatever_unit_the_system_counts_in(
    monkeypatch: pytest.MonkeyPatch, system: str, unit: int
) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("diffusers_mixofshow.fusion.report.sys.platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=300 * 2**20 // unit))
    assert _peak_memory()["peak_memory_mib"] == 300
