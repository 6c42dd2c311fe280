"""The demo's stages on the embedded base, as small as they get, and what it does with the user's own photos."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from diffusers_mixofshow.demo import DemoSettings, run_demo, stages, tuning
from diffusers_mixofshow.demo.fusing import fuse_all
from diffusers_mixofshow.demo.photos import prepare_photos, read_photo_images
from diffusers_mixofshow.demo.tuning import ON_STEP, fingerprint, tune_all, tuning_config
from diffusers_mixofshow.errors import ConfigurationError, OverwriteError, TrainingDataError
from diffusers_mixofshow.notes import read_note
from diffusers_mixofshow.pipelines import MixOfShowPipeline
from diffusers_mixofshow.progress import listen
from diffusers_mixofshow.toyland.base import load_pipeline


TINY = {"max_train_steps": 1, "embedding_phase_steps": 1, "train_batch_size": 2, "captions_per_step": 1}


class Reached(Exception):
    """The first stage has begun."""


@pytest.fixture(autouse=True)
def workers_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))


def tiny_settings(folder: Path) -> DemoSettings:
    return DemoSettings(
        folder=folder,
        concepts=("bobo", "kiki"),
        photo_count=2,
        tuning=TINY,
        fusion={"prompts": ["a <TOK>"], "steps": 1},
        pictures=1,
        together=1,
        steps=1,
        workers=2,
    )


def test_the_whole_demo_and_again_from_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(tmp_path)
    settings = replace(settings, tuning={**settings.tuning, "latents_dir": str(tmp_path / "latents")})
    monkeypatch.setattr("diffusers_mixofshow.progress._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setenv("TQDM_DISABLE", "others")  # as the command line does where bars cannot be drawn
    log = io.StringIO()
    page = run_demo(settings, console=Console(file=log))
    told = capsys.readouterr().err
    assert re.search(
        r"\n    tuning: 1/4 \[.*<bobo> \d/2, <kiki> \d/2\]\n", told
    )  # one of the two has done no step yet
    assert re.search(r"\n    tuning: 4/4 \[.*<bobo> 2/2, <kiki> 2/2\]\n", told)
    assert re.search(r"\n    sampling: 10/10 \[", told)
    assert re.search(r"[\x00-\x09\x0b-\x1f]", log.getvalue() + told) is None
    assert page == tmp_path / "index.html"
    beside = re.findall(r"href='([^#'][^']*)'", page.read_text(encoding="utf-8"))
    assert [name for name in beside if not (tmp_path / name).is_file()] == []
    assert len(beside) == 5
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["settings"]["folder"], report["settings"]["photos"]) == (tmp_path.name, None)
    assert report["settings"]["tuning"]["latents_dir"] == "latents"
    assert str(tmp_path) not in json.dumps(report["settings"])
    assert list(report["seconds"]) == ["photos", "tuning", "fusion", "sampling", "measuring"]
    assert [f"{number}/6" in log.getvalue() for number in range(1, 8)] == [True] * 6 + [False]
    assert set(report["identity_retention"]) == {"average", "fused"}
    assert set(report["right_concept_in_region"]) == {"regional", "unguided"}
    assert report.keys() >= {"command", "commit", "time", "machine", "versions", "settings"}
    for method, found in report["right_concept_in_region"].items():
        assert report["intervals"]["right_concept_in_region"][method]["regions"]["mean"] == found["regions"]
    shares = report["right_concept_in_region"]
    summary = " ".join(log.getvalue().split())
    regional, unguided = (shares[method]["regions"] for method in ("regional", "unguided"))
    assert f"Right concept in its region: {regional:.0%} with regions, {unguided:.0%} without" in summary
    for method, kept in report["identity_retention"].items():
        looks, alike = ("-" if kept[name] is None else f"{kept[name]:.0%}" for name in ("attributes", "alignment"))
        assert f"Identity kept by {method}: {looks} (looks), {alike} (like the photos)" in summary
    together, kiki = (read_note(tmp_path / "sheets" / f"{name}.png")["rows"] for name in ("together", "kiki"))
    (asked,) = together["with regions"]
    assert (
        asked
        == together["without"][0]
        == {"prompt": "a <bobo> critter and a <kiki> critter in a meadow", "seed": 5000}
    )
    assert kiki["fused"] == [{"prompt": "a photo of a <kiki> in the meadow", "seed": 1000}]
    assert kiki["class word"] == [{"prompt": "a photo of a critter in the meadow", "seed": 1000}]
    files = list(tmp_path.rglob("edlora.safetensors"))
    assert len(files) == 4
    before = {path: path.stat().st_mtime_ns for path in files}

    steps: list[tuple[str, int, int]] = []
    tune_all(prepare_photos(settings), settings, lambda name, step, total, loss: steps.append((name, step, total)))
    assert steps == [("bobo", 2, 2), ("kiki", 2, 2)]
    singles = [tmp_path / "concepts" / name for name in settings.concepts]
    pipe, fused = load_pipeline(pipeline_class=MixOfShowPipeline), []
    packs = fuse_all(pipe, singles, settings, lambda: fused.append(1))
    assert packs == {name: tmp_path / name for name in ("average", "fused")}
    assert {path: path.stat().st_mtime_ns for path in files} == before
    fuse_all(pipe, singles, replace(settings, fusion=settings.fusion | {"steps": 2}), lambda: fused.append(1))
    assert len(fused) == 4
    assert {path for path in files if path.stat().st_mtime_ns != before[path]} == {
        folder / "edlora.safetensors" for folder in packs.values()
    }


def test_a_folder_of_something_else_is_refused_unless_it_may_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers_mixofshow.demo.stages._write_photos", lambda *_: (_ for _ in ()).throw(Reached))
    settings, log = tiny_settings(tmp_path / "demo"), Console(file=io.StringIO())
    for again in (settings, replace(settings, workers=1)):  # a new folder, and the same demo going on
        with pytest.raises(Reached):
            run_demo(again, console=log)
    (tmp_path / "demo" / "photos").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("mine")
    other = replace(settings, seed=1)
    with pytest.raises(OverwriteError, match=r"demo\.json, .*mine\.txt, .*photos are there already.*another folder"):
        run_demo(other, console=log)
    with pytest.raises(Reached):
        run_demo(replace(other, overwrite=True), console=log)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["demo.json", "mine.txt"]
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("mine")
    with pytest.raises(OverwriteError, match=r"index\.html is there already"):
        run_demo(tiny_settings(tmp_path / "page"), console=log)


def test_own_photos_inside_the_demos_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos" / "mine").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="lies in the demo's own folder"):
        DemoSettings(folder=tmp_path, photos=tmp_path / "photos" / "mine", class_word="dog")


def test_a_failing_worker_says_why(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    concepts = prepare_photos(settings)
    next(concepts[0].folder.glob("*.png")).write_bytes(b"no picture")
    with pytest.raises(TrainingDataError, match=r"Tuning <bobo> failed: .* no readable picture"):
        tune_all(concepts, settings, lambda name, step, total, loss: None)


def test_every_step_of_a_worker_is_told_with_its_loss(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    told: list[tuple[str, int, int, float]] = []
    tune_all(prepare_photos(settings)[:1], settings, lambda *step: told.append(step))
    assert [step[:3] for step in told] == [("bobo", 0, 2), ("bobo", 1, 2), ("bobo", 2, 2)]
    assert math.isnan(told[0][3])
    assert all(0 < step[3] < 2 for step in told[1:])  # the mean squared error of noise with unit variance


def test_other_photos_or_settings_are_another_fingerprint(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    concept = prepare_photos(settings)[0]
    config = tuning_config(concept, settings)
    first = fingerprint(config)
    assert fingerprint(config) == first
    (concept.folder / "0000.txt").write_text("a photo of a <TOK>\n")
    assert fingerprint(config) != first


def test_own_photos_take_the_place_of_a_concept_of_their_class(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (90, 120), "brown").save(own / "waldi.jpg")
    concepts = prepare_photos(DemoSettings(folder=tmp_path / "demo", photos=own, class_word="Dog", photo_count=1))
    assert [concept.name for concept in concepts] == ["bobo", "kiki", "mine", "ming"]
    assert concepts[2].attributes == {}
    assert [photo.size for photo in read_photo_images(concepts[2])] == [(64, 64)]
    assert "<mine>" in (concepts[2].folder / "waldi.txt").read_text()


def test_a_class_that_the_base_does_not_know_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    settings = DemoSettings(folder=tmp_path / "demo", photos=own, class_word="unicorn", photo_count=1)
    with pytest.raises(ConfigurationError, match="critter, dog, cat"):
        prepare_photos(settings)
    with pytest.raises(ConfigurationError, match="critter, dog, cat"):
        run_demo(settings, console=Console(quiet=True))
    assert not settings.folder.exists()  # so that the next demo finds room there


def test_folders_and_files_of_systems_are_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    concept = prepare_photos(settings)[0]
    before = fingerprint(tuning_config(concept, settings))
    for name in (".DS_Store", "Thumbs.db"):
        (concept.folder / name).write_bytes(b"x")
    assert fingerprint(tuning_config(concept, settings)) == before


def test_every_training_setting_reaches_the_worker(tmp_path: Path) -> None:
    given = tiny_settings(tmp_path)
    settings = replace(given, tuning={**given.tuning, "latents_dir": tmp_path / "latents"}, workers=1)
    tune_all(prepare_photos(settings), settings, lambda *_: None)
    assert any((tmp_path / "latents").iterdir())


def test_a_caption_of_several_lines_stays_one_caption(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    Image.new("RGB", (80, 64), "red").save(tmp_path / "own" / "a.png")
    told = {"file_name": "a.png", "text": "a <TOK>\nin a meadow"}
    (tmp_path / "own" / "metadata.jsonl").write_text(json.dumps(told))
    settings = replace(tiny_settings(tmp_path / "demo"), photos=tmp_path / "own", class_word="dog")
    (own,) = (concept for concept in prepare_photos(settings) if concept.name == "mine")
    assert (own.folder / "a.txt").read_text() == "a <mine> in a meadow\n"


def test_steps_are_counted_where_bars_are_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell_steps(_concepts: object, _settings: object, on_step: ON_STEP) -> dict[str, Path]:
        for step in range(5):
            on_step("bobo", step, 4, 0.0)
        return {}

    heard: list[int] = []
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(tuning, "tune_all", tell_steps)
    settings = tiny_settings(tmp_path)
    with listen(lambda _name, done, _total: heard.append(done)):
        stages._tune(prepare_photos(settings), settings, stages._Stages(Console(file=io.StringIO())))
    assert max(heard) == 4


def test_no_workers_are_refused(tmp_path: Path) -> None:
    for workers in (-1, 0):
        with pytest.raises(ConfigurationError, match=f"workers is {workers}, expected at least 1"):
            replace(tiny_settings(tmp_path), workers=workers)
