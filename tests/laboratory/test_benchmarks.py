"""The benchmarks that are scripts: each runs as its users run it, on Toyland and with as little as it takes."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_mixofshow import Concept, TrainingConfig, toyland
from diffusers_mixofshow.families.sdxl import STABLE_DIFFUSION_XL
from diffusers_mixofshow.sampling.loading import load_base
from packs import random_pack


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
IN_REGIONS = ("bobo", "kiki", "nono", "rex", "pixel", "ming", "neon", "throne")
"""The concepts of `benchmarks/regions.py`."""
CRITTERS = ("bobo", "kiki", "momo", "zuzu", "lulu", "tiki", "nono", "vivi")

Run = Callable[..., Any]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Runs a script of the folder with these arguments and returns its JSON record, the only one that it writes.

    What the script imports from its folder is forgotten afterwards: elsewhere the same names mean other modules.
    """
    monkeypatch.syspath_prepend(BENCHMARKS)
    known = set(sys.modules)

    def run_script(script: str, *arguments: object, record: str = "--record") -> Any:
        path = tmp_path / "record" / ("record.json" if record == "--record" else "")
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments), record, str(path)])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        (written,) = (tmp_path / "record").glob("*.json")
        return json.loads(written.read_text("utf-8"))

    yield run_script
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def write_packs(folder: Path, names: tuple[str, ...], base: str = "toyland") -> Path:
    """ED-LoRAs of Toyland's concepts that nobody tuned, so weak that pictures stay pictures."""
    components = load_base(base, "cpu", "float32", concepts=True).components
    for number, name in enumerate(names):
        concept = Concept.from_name(name, toyland.CONCEPTS[name].class_word)
        pack = random_pack(components, concept, seed=number, scale=0.02, base_model=base)
        pack.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ED-LoRAs of all concepts that the benchmarks of the first base know."""
    return write_packs(tmp_path_factory.mktemp("concepts"), tuple(dict.fromkeys((*CRITTERS, *IN_REGIONS))))


@pytest.fixture(scope="module")
def concepts_of_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of three critters on the second base."""
    return write_packs(tmp_path_factory.mktemp("concepts-xl"), CRITTERS[:3], "toyland-xl")


def test_company_tunes_beside_others_and_reads_every_place(
    run: Run, concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = partial(TrainingConfig.toyland, max_train_steps=2, embedding_phase_steps=1)
    monkeypatch.setattr(TrainingConfig, "toyland", short)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "concepts").symlink_to(concepts)
    beside = ("itself, another's photos", "itself, the base's pictures")
    told = run(
        *("company.py", "--work", tmp_path / "work", "--critters", "kiki", "--pictures", 1, "--together", 0),
        *("--beside", *beside),
        record="--output",
    )
    assert list(told["looks"]) == ["itself", *beside]
    for places in told["looks"].values():
        assert list(places) == ["alone", "twice, left", "twice, right", "behind a stranger"]
        assert all(0 <= value["mean"] <= 1 for value in places.values())


def test_regions_sums_up_layouts_by_their_kinds(run: Run, concepts: Path, tmp_path: Path) -> None:
    told = run(
        *("regions.py", "--work", tmp_path / "work", "--concepts", concepts, "--layouts", 2, "--steps", 1),
        *("--ways", "the same, averaged weights"),
    )
    (rows,) = told["results"].values()
    assert list(rows) == ["all", "every class once", "2 concepts", "3 concepts"]
    assert rows["all"].keys() >= {"right", "missing", "leaked", "whole_pictures"}
    assert len(list((tmp_path / "work").glob("kept-*/the-same-averaged-weights.png"))) == 1


def test_toyland_measures_regions_on_the_base_that_is_asked_for(
    run: Run, concepts_of_xl: Path, tmp_path: Path
) -> None:
    told = run(
        *("toyland.py", "--base", "toyland-xl", "--concepts", concepts_of_xl, "--work", tmp_path / "work"),
        *("--critters", *CRITTERS[:3], "--only", "together", "--ways", "natural", "--together", 1, "--steps", 1),
        record="--output",
    )
    assert told["plan"]["base"] == "toyland-xl"
    assert list(told["together"]) == ["3, natural", "3, drawn"]


@pytest.mark.parametrize(("model", "authors"), [("toyland", 2), ("toyland-xl", 0)])
def test_attention_compares_with_the_plain_pipeline(run: Run, model: str, authors: int) -> None:
    """It refuses to compare ways that draw different pictures, so that the authors' way must be one of sampling."""
    told = run("attention.py", "--model", model, "--steps", 2, "--rounds", 2)
    assert sum("authors' way" in name for name in told["results"]) == authors
    assert len(told["results"]) == 6 + authors


def test_rivals_solves_what_its_ways_need(run: Run, concepts: Path) -> None:
    ways = ("average", "closed-form", "closed-form:ridge=0.1", "closed-form:weights alone")
    told = run("rivals.py", "--concepts", concepts, "--count", 2, "--steps", 1, "--ways", *ways)
    assert list(told["results"]["ways"]) == list(ways)
    average, closed = (told["results"]["ways"][way]["recorded"]["all"] for way in ("average", "closed-form"))
    assert 0 < closed["low"] <= closed["mean"] <= closed["high"]
    assert closed["mean"] < average["mean"]
    assert closed["count"] == 2, "one value a concept"


def test_files_are_fused_by_every_method_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    told = run(
        *("fusion_files.py", "--work", tmp_path / "work", "--concepts", 2, "--blocks", 2),
        *("--methods", "closed-form", "ties"),
    )
    assert list(told["results"]) == ["2 concepts", "2 concepts, ties"]
    assert all(row["peak_memory_mib"] > 0 for row in told["results"].values())


@pytest.mark.skipif(sys.platform == "win32", reason="a script of bash")
def test_every_measurement_that_waits_for_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    command = ["bash", str(BENCHMARKS / "device.sh"), str(tmp_path), "--dry"]
    told = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHON": sys.executable}
    )
    assert told.returncode == 0, told.stdout[-2000:]
    assert len(list(tmp_path.glob("*.json"))) == 5


def test_recordings_are_added_up_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of parts of the features, added up, are those of all features."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    curve = runpy.run_path(str(BENCHMARKS / "recording_curve.py"))
    features = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    whole, first, second = (curve["ConceptStatistics"]() for _ in range(3))
    for statistics, part in ((whole, features), (first, features[:3]), (second, features[3:])):
        statistics.add("input", part)
    added = curve["Added"]((first, second))
    assert (added.inputs, added.parts, added.tokens("input")) == (("input",), ("fit",), 10)
    torch.testing.assert_close(added.gram("input").matrix(), whole.gram("input").matrix())


def test_layers_share_embeddings_again_after_they_were_measured_apart() -> None:
    training = runpy.run_path(str(BENCHMARKS / "training.py"))
    layer = "mid_block.attentions.0.transformer_blocks.3.attn2"
    with training["embeddings_of_each_layer"]():
        assert STABLE_DIFFUSION_XL.embedding_layer_of(layer) == layer
    assert STABLE_DIFFUSION_XL.embedding_layer_of(layer) == "mid_block.attentions.0"
