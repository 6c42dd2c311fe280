"""Statistics as files: what they keep, what is refused, and that nothing is half-written."""

import itertools
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_mixofshow.atomic import write_whole
from diffusers_mixofshow.errors import FileWriteError, FusionError, OverwriteError
from diffusers_mixofshow.fusion.compression import Spectrum, allocate_ranks
from diffusers_mixofshow.fusion.config import FusionConfig
from diffusers_mixofshow.fusion.gram import DenseGram
from diffusers_mixofshow.fusion.published import DamagedStatisticsError, SourceStatistics, statistics_path
from diffusers_mixofshow.fusion.sketch import WIDEST_MATRIX
from diffusers_mixofshow.fusion.statistics import ConceptStatistics


WIDTH = 24


def _statistics(rank: int = WIDTH) -> SourceStatistics:
    generator = torch.Generator().manual_seed(0)
    concept = ConceptStatistics()
    for name in ("one", "two"):
        mixing = torch.randn(rank, WIDTH, generator=generator) * torch.logspace(0, -3, rank)[:, None]
        concept.add(name, torch.randn(300, rank, generator=generator) @ mixing)
        concept.add(name, torch.randn(100, rank, generator=generator) @ mixing, part="held_out")
    return SourceStatistics(
        digest="ab12", base_model="tiny", recording={"steps": 2, "prompts": ["a <rex>"]}, concepts={"<rex>": concept}
    )


def test_full_matrices_come_back(tmp_path: Path) -> None:
    statistics = _statistics()
    path = statistics.save(tmp_path / "x.statistics.safetensors", max_bytes=None)
    again = SourceStatistics.load(path)
    assert (again.digest, again.base_model, again.recording) == ("ab12", "tiny", statistics.recording)
    ours, theirs = again.concepts["<rex>"], statistics.concepts["<rex>"]
    assert ours.inputs == theirs.inputs == ("one", "two")
    assert ours.parts == ("fit", "held_out")
    assert ours.tokens("one") == 400
    for part in (None, "fit", "held_out"):
        found, expected = (each.gram("one", part).matrix() for each in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["x.statistics.safetensors"]


def test_low_rank_factors_keep_trace_and_the_leading_part(tmp_path: Path) -> None:
    statistics = _statistics()
    path = statistics.save(tmp_path / "low", max_bytes=4 * 8 * WIDTH * 2)
    assert sum(t.nbytes for name, t in load_file(path).items() if name.endswith("rows")) <= 4 * 8 * WIDTH * 2
    ours, theirs = SourceStatistics.load(path).concepts["<rex>"], statistics.concepts["<rex>"]
    for name in ("one", "two"):
        mine, full = ours.gram(name, "fit").matrix(), theirs.gram(name, "fit").matrix()
        assert mine.trace() == pytest.approx(full.trace().item(), rel=2e-3)
        assert (mine - full).norm() < 0.05 * full.norm()
        assert 0.9 < ours.gram(name, "fit").energy < 1


def test_a_matrix_of_low_rank_is_kept_whole(tmp_path: Path) -> None:
    statistics = _statistics(rank=5)
    path = statistics.save(tmp_path / "low", max_bytes=10**6)
    assert max(len(t) for name, t in load_file(path).items() if name.endswith("rows")) == 5
    ours, theirs = SourceStatistics.load(path).concepts["<rex>"], statistics.concepts["<rex>"]
    torch.testing.assert_close(ours.gram("one").matrix(), theirs.gram("one").matrix(), rtol=2e-3, atol=2e-3)


def test_the_budget_goes_where_energy_is() -> None:
    spectra = {"flat": torch.ones(10), "steep": torch.tensor([100.0] + [0.1] * 9), "none": torch.zeros(4)}
    ranks = allocate_ranks(spectra, 2 * 10 * 4)
    assert ranks == {"flat": 3, "steep": 1, "none": 0}
    assert allocate_ranks(spectra, 2 * 10 * 4, {"flat": 0.01, "steep": 1, "none": 1})["steep"] == 4
    assert allocate_ranks(spectra, 0) == {"flat": 0, "steep": 0, "none": 0}


def test_tail_spreads_what_is_left_out() -> None:
    factor = Spectrum.of(DenseGram(torch.diag(torch.tensor([4.0, 2.0, 1.0]).double()))).leading(1)
    torch.testing.assert_close(factor.matrix(), torch.diag(torch.tensor([4.0, 1.5, 1.5]).double()))
    assert factor.energy == pytest.approx(4 / 7)


def test_few_eigenvectors_of_a_large_matrix_are_those_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(100, 100, generator=generator).double()).Q
    gram = (basis * torch.logspace(0, -4, 100).double()) @ basis.T
    few, every = (Spectrum.of(DenseGram(gram), known) for known in (8, None))
    assert few.vectors.shape == (100, 8)
    torch.testing.assert_close(few.values[:8], every.values[:8], rtol=1e-4, atol=0)
    torch.testing.assert_close(few.values.sum(), gram.trace())
    torch.testing.assert_close(few.leading(6).matrix(), every.leading(6).matrix(), rtol=1e-3, atol=1e-3)
    assert len(few.leading(50).rows) == 8


def test_statistics_lie_beside_the_lora() -> None:
    assert statistics_path(Path("a/edlora.safetensors")) == Path("a/edlora.statistics.safetensors")


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    concept = ConceptStatistics()
    concept.add("one", torch.full((3, 4), float("inf")))
    with pytest.raises(FusionError, match=r"<rex> hold NaN or Inf at 1 inputs, first at one"):
        replace(_statistics(), concepts={"<rex>": concept}).save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [4, WIDEST_MATRIX + 1])
def test_nan_is_named_at_layers_of_any_width(width: int) -> None:
    concept = ConceptStatistics()
    concept.add("one", torch.full((3, width), float("nan")))
    with pytest.raises(FusionError, match=r"<rex> hold NaN or Inf at 1 inputs, first at one"):
        replace(_statistics(), concepts={"<rex>": concept}).to_bytes("auto")


@pytest.mark.parametrize("size", [0, -1, 5e4, "huge", float("nan")])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(FusionError, match="size of saved statistics must be"):
        _statistics().to_bytes(size)
    with pytest.raises(FusionError, match="size of saved statistics must be"):
        FusionConfig(statistics_bytes=size)


def test_what_is_no_file_of_statistics_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FusionError, match="cannot be read"):
        SourceStatistics.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FusionError, match="cannot be read"):
        SourceStatistics.load(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"edlora_statistics": '{"format_version": 9}'})
    with pytest.raises(FusionError, match="format version 9, this release reads 1"):
        SourceStatistics.load(path)
    header = {"format_version": 1, "source": "x", "base_model": "y", "recording": {}, "form": "full"}
    save_file({"a": torch.zeros(1)}, path, metadata={"edlora_statistics": json.dumps(header)})
    with pytest.raises(FusionError, match="missing or of another type: concepts"):
        SourceStatistics.load(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"edlora_statistics": json.dumps(header | {"concepts": {}})})
    with pytest.raises(FusionError, match="0 missing, 1 unexpected"):
        SourceStatistics.load(path)
    wrong = header | {"concepts": {"<rex>": {"one": {"fit": {"tokens": -1}}}}}
    save_file({"a": torch.zeros(1)}, path, metadata={"edlora_statistics": json.dumps(wrong)})
    with pytest.raises(FusionError, match="the inputs in its header do not follow this format version"):
        SourceStatistics.load(path)


def test_nan_in_a_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = _statistics().save(tmp_path / "x", max_bytes=None)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    tensors["<rex>|fit|two|gram"][0, 0] = float("nan")
    save_file(tensors, path, metadata=metadata)
    concept = SourceStatistics.load(path).concepts["<rex>"]
    assert concept.gram("one").matrix().isfinite().all()
    with pytest.raises(FusionError, match="two of <rex> holds NaN or Inf"):
        concept.gram("two")


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OverwriteError, match=r"mine is there already.*overwrite=True"):
        _statistics().save(tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == b"mine"
    with pytest.raises(FileWriteError, match="there are folders"):
        _statistics().save(tmp_path / "folder", overwrite=True)
    _statistics().save(tmp_path / "mine", overwrite=True)
    assert SourceStatistics.load(tmp_path / "mine").digest == _statistics().digest


def test_other_statistics_in_the_place_of_those_in_use_are_refused(tmp_path: Path) -> None:
    path = _statistics().save(tmp_path / "x", max_bytes=None)
    loaded = SourceStatistics.load(path)
    concept = loaded.concepts["<rex>"]
    before = concept.gram("one").matrix()
    _statistics().save(path, max_bytes=None, overwrite=True)  # the same once more, as another process may record them
    assert torch.equal(concept.gram("one").matrix(), before)
    for other in (replace(_statistics(), digest="cd34"), _statistics(rank=5)):
        other.save(path, max_bytes=10**6, overwrite=True)
        with pytest.raises(FusionError, match=r"x was replaced by other statistics while it was in use\. Fuse again"):
            concept.gram("one")
        with pytest.raises(FusionError, match="x was replaced by other statistics"):
            loaded.copy(tmp_path / "y")
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    path.unlink()
    with pytest.raises(FusionError, match="cannot be read any more"):
        concept.gram("one")
    with pytest.raises(FusionError, match="x cannot be read any more"):
        loaded.copy(tmp_path / "y")
    for junk in (b"none", b"\x02" + bytes(7) + b"[]", b"\x04" + bytes(7) + b"\xff\xfe{}", b"\x50" + bytes(7) + b"{"):
        path.write_bytes(junk)
        with pytest.raises(FusionError, match="x cannot be read any more"):
            loaded.copy(tmp_path / "y")
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_statistics_that_are_replaced_again_and_again_are_read_whole(tmp_path: Path) -> None:
    first, second = (replace(_statistics(), recording={"steps": steps}) for steps in (2, 3))
    contents = [one.to_bytes(None) for one in (first, second)]
    path, stop = tmp_path / "x", threading.Event()
    path.write_bytes(contents[0])

    def write() -> None:
        for turn in itertools.cycle((0, 1)):
            if stop.is_set():
                return
            write_whole(path, contents[turn])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = [SourceStatistics.load(path).recording["steps"] for _ in range(20)]
    finally:
        stop.set()
        writer.join()
    assert set(found) <= {2, 3}


SOUND = {"tokens": 3, "tail": 0.5, "energy": 0.9}
NUMBERS = {
    "no tokens": {"tokens": 0},
    "half a token": {"tokens": 2.5},
    "a truth for tokens": {"tokens": True},
    "endlessly many tokens": {"tokens": 2**63},
    "tokens in words": {"tokens": "3"},
    "a tail below zero": {"tail": -0.1},
    "a tail that is no number": {"tail": float("nan")},
    "an endless energy": {"energy": float("inf")},
    "an energy in words": {"energy": "all"},
    "one more": {"more": 1},
}


def _with_header(path: Path, entries: object, tensors: dict[str, torch.Tensor], **changes: object) -> Path:
    header = {"format_version": 1, "source": "x", "base_model": "y", "recording": {}, "form": "low-rank"}
    text = json.dumps({**header, "concepts": entries, **changes})
    save_file(tensors, path, metadata={"edlora_statistics": text})
    return path


def _tensors(
    rows: tuple[int, ...] = (2, 4), scale: tuple[int, ...] = (2,), part: str = "fit"
) -> dict[str, torch.Tensor]:
    return {f"<rex>|{part}|one|rows": torch.ones(rows).half(), f"<rex>|{part}|one|scale": torch.full(scale, 0.5)}


def test_a_header_that_is_sound_is_read_as_it_is_meant(tmp_path: Path) -> None:
    for least in (SOUND, SOUND | {"tail": 0, "tokens": 1, "energy": 1}):
        path = _with_header(tmp_path / "x", {"<rex>": {"one": {"fit": least}}}, _tensors())
        concept = SourceStatistics.load(path).concepts["<rex>"]
        assert (concept.inputs, concept.parts, concept.tokens("one", "held_out")) == (("one",), ("fit",), 0)
        assert concept.tokens("one") == least["tokens"]
        wanted = 2 * 0.25 * torch.ones(4, 4) + least["tail"] * torch.eye(4)
        torch.testing.assert_close(concept.gram("one").matrix(), wanted.double())


@pytest.mark.parametrize("change", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_a_header_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = _with_header(tmp_path / "x", {"<rex>": {"one": {"fit": SOUND | change}}}, _tensors())
    with pytest.raises(DamagedStatisticsError, match="the inputs in its header do not follow this format version"):
        SourceStatistics.load(path)


@pytest.mark.parametrize(
    "entry",
    [[], {"one": []}, {"one": {}}, {"one": {"other": SOUND}}, {"one": {"fit": {"tokens": 3}}}, {"one": {"fit": 1}}],
)
def test_entries_of_a_header_that_cannot_be_are_refused(tmp_path: Path, entry: object) -> None:
    path = _with_header(tmp_path / "x", {"<rex>": entry}, _tensors())
    with pytest.raises(DamagedStatisticsError, match="the inputs in its header do not follow this format version"):
        SourceStatistics.load(path)


@pytest.mark.parametrize("field", ["source", "base_model", "recording", "form", "concepts"])
def test_fields_of_a_header_of_another_kind_are_named(tmp_path: Path, field: str) -> None:
    path = _with_header(tmp_path / "x", {"<rex>": {"one": {"fit": SOUND}}}, _tensors(), **{field: 3})
    with pytest.raises(DamagedStatisticsError, match=rf"another type: {field}\."):
        SourceStatistics.load(path)


@pytest.mark.parametrize(
    ("version", "kind"),
    [(2, FusionError), (0, DamagedStatisticsError), ("1", DamagedStatisticsError), (True, DamagedStatisticsError)],
)
def test_newer_files_are_not_damaged_ones(tmp_path: Path, version: object, kind: type) -> None:
    path = _with_header(tmp_path / "x", {}, {}, format_version=version)
    with pytest.raises(FusionError, match="this release reads 1") as caught:
        SourceStatistics.load(path)
    assert type(caught.value) is kind
    assert ("Update" in str(caught.value)) == (kind is FusionError)


@pytest.mark.parametrize(
    "tensors",
    [
        _tensors(rows=(2, 2, 2)),
        _tensors(scale=(3,)),
        _tensors(scale=(2, 1)),
        _tensors(rows=(1, 2**17 + 1), scale=(1,)),
        _tensors() | _tensors(part="held_out", rows=(2, 5)),
    ],
    ids=["three dimensions", "a scale too many", "scales in a table", "too wide", "two widths"],
)
def test_tensors_that_do_not_belong_together_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    parts = dict.fromkeys(("fit", "held_out") if len(tensors) > 2 else ("fit",), SOUND)
    path = _with_header(tmp_path / "x", {"<rex>": {"one": parts}}, tensors)
    with pytest.raises(DamagedStatisticsError, match=r"of another shape: .*one"):
        SourceStatistics.load(path)


def test_full_matrices_are_square(tmp_path: Path) -> None:
    tensors = {"<rex>|fit|one|gram": torch.ones(4, 5)}
    path = _with_header(tmp_path / "x", {"<rex>": {"one": {"fit": SOUND}}}, tensors, form="full")
    with pytest.raises(DamagedStatisticsError, match=r"of another shape: 1 \(<rex>\|fit\|one\|gram"):
        SourceStatistics.load(path)


def test_copies_are_the_same_bytes_and_the_file_itself_stays(tmp_path: Path) -> None:
    path = _statistics().save(tmp_path / "x", max_bytes=2000)
    loaded = SourceStatistics.load(path)
    assert loaded.file == path
    (tmp_path / "y").write_bytes(b"replaced")
    loaded.copy(tmp_path / "y")
    loaded.copy(path)
    assert (tmp_path / "y").read_bytes() == path.read_bytes() != b"replaced"
    _statistics().copy(tmp_path / "z")
    assert SourceStatistics.load(tmp_path / "z").concepts["<rex>"].tokens("one", "held_out") == 100


def test_the_budget_is_for_each_concept_and_kept(tmp_path: Path) -> None:
    """A part counts by its share of the tokens: 300 of 400 were fitted. What is left of the bytes is not wasted."""
    one = _statistics().concepts["<rex>"]
    both = replace(_statistics(), concepts={"<rex>": one, "<kit>": one})
    tensors = load_file(both.save(tmp_path / "x", max_bytes=2 * WIDTH * 40))
    for name in ("<rex>", "<kit>"):
        kept = {
            part: sum(len(tensors[f"{name}|{part}|{layer}|rows"]) for layer in ("one", "two"))
            for part in ("fit", "held_out")
        }
        assert kept["fit"] + kept["held_out"] == 40
        assert kept["fit"] > 1.2 * kept["held_out"]
    for name, values in tensors.items():
        if name.endswith("rows"):
            torch.testing.assert_close(values.abs().amax(dim=1), torch.ones(len(values)).half())
