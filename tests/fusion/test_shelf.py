"""What a fusion in stages keeps until it is done."""

from pathlib import Path
from typing import Any

import pytest
import torch

import packs
import tiny
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import FusionError, MixOfShowWarning
from diffusers_mixofshow.fusion import GradientFuser
from diffusers_mixofshow.fusion.shelf import StageShelf
from diffusers_mixofshow.fusion.statistics import ConceptStatistics
from diffusers_mixofshow.pipelines import MixOfShowPipeline


@pytest.fixture(scope="module")
def source() -> EDLoRA:
    return packs.random_pack(tiny.components(), "rex", ranks=(1,))


class _Recorder:
    """Gathers statistics and counts how often."""

    def __init__(self, value: float = 1.0) -> None:
        self.calls, self.value = 0, value

    def __call__(self) -> dict[str, ConceptStatistics]:
        self.calls += 1
        statistics = ConceptStatistics()
        statistics.add("layer", torch.full((3, 4), self.value))
        return {"<rex>": statistics}


def test_what_lies_there_is_taken_and_clearing_removes_it(tmp_path: Path, source: EDLoRA) -> None:
    record = _Recorder()
    for _ in range(2):
        with StageShelf({"ridge": 0.1}) as shelf:
            found = shelf.load_or_record(tmp_path / "new", source, {"steps": 1}, record)
            assert torch.equal(found.concepts["<rex>"].gram("layer").matrix(), torch.ones(4, 4).double())
    assert record.calls == 1
    with StageShelf({"ridge": 0.2}) as other:
        other.load_or_record(tmp_path / "new", source, {"steps": 1}, record)
        other.clear()
    assert record.calls == 2
    assert len(list((tmp_path / "new").iterdir())) == 1  # that of the other fusion


def test_a_damaged_file_is_recorded_again(tmp_path: Path, source: EDLoRA) -> None:
    record = _Recorder()
    with StageShelf({}) as shelf:
        shelf.load_or_record(tmp_path, source, {}, record)
        (file,) = tmp_path.glob(".*.stage.safetensors")
        file.write_bytes(file.read_bytes()[:-9])
        shelf.load_or_record(tmp_path, source, {}, record)
    assert record.calls == 2


def test_without_a_folder_nothing_outlives_it(source: EDLoRA) -> None:
    with StageShelf({}) as shelf:
        found = shelf.load_or_record(None, source, {}, _Recorder())
        assert found.file is not None
        assert found.file.exists()
    assert not found.file.exists()


def test_nothing_half_written_is_left(tmp_path: Path, source: EDLoRA) -> None:
    with StageShelf({}) as shelf:
        with pytest.raises(FusionError, match="hold NaN or Inf"):
            shelf.load_or_record(tmp_path, source, {}, _Recorder(float("nan")))
        (tmp_path / "file").write_text("no folder")
        with pytest.raises(FusionError, match="cannot be written"):
            shelf.load_or_record(tmp_path / "file", source, {}, _Recorder())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_fusions_of_the_same_at_once_do_not_take_each_others_files(tmp_path: Path, source: EDLoRA) -> None:
    record, others = _Recorder(), _Recorder()
    with StageShelf({}) as shelf, StageShelf({}) as other:
        mine = shelf.load_or_record(tmp_path, source, {}, record)
        with pytest.warns(MixOfShowWarning, match="Another fusion of the same sources is under way"):
            theirs = other.load_or_record(tmp_path, source, {}, others)
        shelf.clear()
        assert torch.equal(theirs.concepts["<rex>"].gram("layer").matrix(), torch.ones(4, 4).double())
        assert (record.calls, others.calls, mine.file != theirs.file) == (1, 1, True)
    assert not list(tmp_path.iterdir())


def test_files_that_somebody_has_removed_are_no_matter(tmp_path: Path, source: EDLoRA) -> None:
    with StageShelf({}) as shelf:
        for steps in (1, 2):
            shelf.load_or_record(tmp_path, source, {"steps": steps}, _Recorder())
        for file in list(tmp_path.iterdir())[:1]:
            file.unlink()
        shelf.clear()
    assert not list(tmp_path.iterdir())


def test_what_is_recorded_otherwise_is_recorded_again(tmp_path: Path, source: EDLoRA) -> None:
    """Another fusion, other settings, another LoRA: each has a file of its own, and they do not mix."""
    other = packs.random_pack(tiny.components(), "rex", ranks=(1,), seed=5)
    for number, (fusion, edlora, steps) in enumerate(
        [(1, source, 1), (2, source, 1), (1, other, 1), (1, source, 2)], 1
    ):
        record = _Recorder(float(number))
        with StageShelf({"ridge": fusion}) as shelf:
            found = shelf.load_or_record(tmp_path, edlora, {"steps": steps}, record)
        assert record.calls == 1
        assert found.concepts["<rex>"].gram("layer").matrix()[0, 0] == number**2
        assert (found.digest, found.base_model) == (edlora.digest, edlora.base_model)
        assert len(list(tmp_path.glob(".*.stage.safetensors"))) == number


def test_an_interrupted_fusion_goes_on_with_the_statistics_of_its_own_base_alone(passes: Any, tmp_path: Path) -> None:
    """Pipelines that are built from components have no name, so that only their weights tell them apart."""
    for seed, name in enumerate(("rex", "kit")):
        packs.random_pack(tiny.components(), name, ranks=(1,), seed=seed).save_pretrained(tmp_path / name)
    sources = [tmp_path / "rex", tmp_path / "kit"]

    def fuse(seed: int, allowed: int) -> None:
        pipe = MixOfShowPipeline(**tiny.components(seed=seed), requires_safety_checker=False)
        passes.allow(allowed)
        GradientFuser(pipe, steps=1, prompts=["<TOK>", "a <TOK>"], batch_size=2, ridge=0.1).fuse(sources)

    with pytest.raises(KeyboardInterrupt):
        fuse(0, 3)
    fuse(1, 100)
    assert passes.done == 6  # two sources in three stages
    fuse(0, 100)
    assert passes.done == 3
