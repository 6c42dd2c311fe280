"""Statistics that were recorded once serve every fusion of the same settings, however these are spelt."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import packs
import tiny
from diffusers_mixofshow import EDLoRATrainer, FusionSource, GradientFuser, MixOfShowPipeline, MixOfShowWarning
from diffusers_mixofshow.base_models import location_of, usual_guidance
from diffusers_mixofshow.cli import app
from diffusers_mixofshow.edlora.file import STATISTICS_KEY
from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.fusion.prompts import RECORDING_PROMPTS
from diffusers_mixofshow.fusion.published import SourceStatistics
from short_training import quick


STATISTICS = "edlora.statistics.safetensors"


def tiny_pipe() -> MixOfShowPipeline:
    return MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)


@pytest.fixture(scope="module")
def tuned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A concept tuned at another size than the model's own, its statistics beside it, and the base."""
    parent = tmp_path_factory.mktemp("client")
    (parent / "photos").mkdir()
    Image.new("RGB", (32, 32), "red").save(parent / "photos" / "0.png")
    base = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    base.save_pretrained(parent / "base")
    settings = {"pretrained_model_name_or_path": str(parent / "base"), "max_train_steps": 1, "resolution": 24}
    settings |= {"save_statistics": True, "output_dir": parent / "potter"}
    EDLoRATrainer(quick(parent / "photos", **settings)).train()
    return parent


@pytest.fixture
def tuned(tuned_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tuned_once / "potter", tmp_path / "potter"))


def identity(file: Path) -> tuple[int, int, bytes]:
    """Changes with everything that is written in the file's place."""
    return file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()


class Kept:
    """Whether a file is still the one that it was, and nobody was told otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.first = folder, sorted(folder.iterdir()), identity(folder / STATISTICS)

    def __enter__(self) -> None:
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("error", MixOfShowWarning)

    def __exit__(self, *failure: object) -> None:
        self.caught.__exit__(*failure)
        if failure[0] is None:
            assert identity(self.folder / STATISTICS) == self.first
            assert sorted(self.folder.iterdir()) == self.files


SAME = {
    "defaults": {},
    "the model's own size": {"height": 32, "width": 32},
    "its height alone": {"height": 32},
    "numbers of NumPy": {"height": np.int64(32), "steps": np.int64(20), "guidance_scale": np.float32(7.5)},
    "steps": {"steps": 20},
    "guidance": {"guidance_scale": 7.5},
    "a tensor's guidance": {"guidance_scale": torch.tensor(7.5)},
    "no negative prompt": {"negative_prompt": None},
    "prompts by kind": {"prompts": RECORDING_PROMPTS},
    "the kind's prompts": {"prompts": RECORDING_PROMPTS["object"]},
    "prompts as a list": {"prompts": list(RECORDING_PROMPTS["object"])},
    "seeds as a list": {"seeds": [0]},
    "a range of seeds": {"seeds": range(1)},
    "a seed of NumPy": {"seeds": np.arange(1)},
    "text tokens": {"text_tokens": "all"},
    "batches": {"batch_size": 1},
    "what is written": {"statistics_bytes": 1000, "dtype": torch.float32, "ridge": 0.5, "max_rank": 2},
}


@pytest.mark.parametrize("settings", SAME.values(), ids=SAME.keys())
def test_the_same_settings_record_nothing(tuned: Path, settings: dict[str, Any]) -> None:
    with Kept(tuned):
        GradientFuser(tiny_pipe(), sequential=False, **settings).fuse([tuned])


def _other_scheduler() -> MixOfShowPipeline:
    pipe = tiny_pipe()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def _with_concept(folder: Path) -> MixOfShowPipeline:
    pipe = tiny_pipe()
    pipe.load_edlora(folder)
    return pipe


PIPES: dict[str, Callable[[Path, Path], MixOfShowPipeline]] = {
    "from the folder": lambda base, tuned: MixOfShowPipeline.from_pretrained(base),
    "from a copy of it": lambda base, tuned: MixOfShowPipeline.from_pretrained(
        shutil.copytree(base, tuned.parent / "copy")
    ),
    "in half precision": lambda base, tuned: MixOfShowPipeline.from_pretrained(base, dtype=torch.bfloat16),
    "with another scheduler": lambda base, tuned: _other_scheduler(),
    "with the concept loaded": lambda base, tuned: _with_concept(tuned),
}


@pytest.mark.parametrize("make", PIPES.values(), ids=PIPES.keys())
def test_any_pipeline_of_the_base_records_nothing(
    tuned_once: Path, tuned: Path, make: Callable[[Path, Path], MixOfShowPipeline]
) -> None:
    pipe = make(tuned_once / "base", tuned)
    with Kept(tuned):
        GradientFuser(pipe, sequential=False).fuse([tuned])
        GradientFuser(pipe).record(tuned)


PLACES: dict[str, Callable[[Path], Any]] = {
    "text": str,
    "file": lambda folder: folder / "edlora.safetensors",
    "source": FusionSource,
    "source with its statistics": lambda folder: FusionSource(folder, statistics=folder / STATISTICS),
    "scale of 1": lambda folder: FusionSource(folder, scale=1),
}


@pytest.mark.parametrize("source", PLACES.values(), ids=PLACES.keys())
def test_any_spelling_of_the_source_records_nothing(tuned: Path, source: Callable[[Path], Any]) -> None:
    with Kept(tuned):
        GradientFuser(tiny_pipe(), sequential=False).fuse([source(tuned)])


@pytest.mark.parametrize("options", [[], ["--features", "own"], ["--features", "own", "--base", "BASE"]])
def test_the_command_line_records_nothing_at_its_defaults(
    tuned_once: Path, tuned: Path, tmp_path: Path, options: list[str]
) -> None:
    given = [str(tuned_once / "base") if option == "BASE" else option for option in options]
    with Kept(tuned):
        warnings.filterwarnings("ignore", "<potter> is the only source")
        result = CliRunner().invoke(
            app, ["fuse", str(tuned), *given, "--output", str(tmp_path / "pack")], catch_exceptions=False
        )
    assert result.exit_code == 0
    assert (tmp_path / "pack" / "edlora.safetensors").exists()


def with_recording(file: Path, **changes: Any) -> None:
    """Write other settings into a file of statistics; None takes a setting out."""
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    header = json.loads(metadata[STATISTICS_KEY])
    header["recording"] |= changes
    metadata[STATISTICS_KEY] = json.dumps(header)
    save_file(load_file(file), file, metadata=metadata)


@pytest.mark.parametrize(
    "changes",
    [
        {"height": None, "width": None},  # as earlier releases wrote the model's own size
        {"height": None},
        {"guidance_scale": 7.50},
        {"negative_prompt": None},
        {"steps": 20.0},
        {"of a later release": "something"},
    ],
)
def test_settings_of_other_releases_are_read_as_they_were_meant(tuned: Path, changes: dict[str, Any]) -> None:
    with_recording(tuned / STATISTICS, **changes)
    with Kept(tuned):
        GradientFuser(tiny_pipe(), sequential=False).fuse([tuned])


SHORT = {"sequential": False, "steps": 1, "prompts": ("<TOK>", "a <TOK>")}


@pytest.fixture
def short(tuned: Path) -> Path:
    """The same concept, recorded in one step."""
    (tuned / STATISTICS).unlink()
    GradientFuser(tiny_pipe(), **SHORT).record(tuned)
    return tuned


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": "many"},
        {"prompts": 3},
        {"seeds": {"a": [float("inf")]}},
        {"guidance_scale": "7.5"},
        {"height": [32]},
        {"negative_prompt": "\x1b[2J" + "x" * 10_000},
    ],
)
def test_settings_that_no_release_writes_are_other_settings(short: Path, changes: dict[str, Any]) -> None:
    with_recording(short / STATISTICS, **changes)
    with pytest.warns(MixOfShowWarning, match="recorded again") as told:
        GradientFuser(tiny_pipe(), **SHORT).record(short)
    assert all("\x1b" not in str(one.message) and len(str(one.message)) < 1000 for one in told)


OTHERS = {
    "steps": ({"steps": 2}, r"steps 1 instead of 2"),
    "guidance": ({"guidance_scale": 3}, r"guidance_scale 7\.5 instead of 3\.0"),
    "without guidance": ({"guidance_scale": 1}, r"guidance_scale 7\.5 instead of 1\.0"),
    "height": ({"height": 16}, r"height 32 instead of 16"),
    "negative prompt": ({"negative_prompt": "blurry"}, r"negative_prompt '' instead of 'blurry'"),
    "seeds": ({"seeds": (0, 1)}, r"seeds \[0\] instead of \[0, 1\]"),
    "text tokens": ({"text_tokens": "concept"}, r"text_tokens 'all' instead of 'concept'"),
    "prompts": ({"prompts": ["a <TOK>"]}, "other prompts"),
    "several": ({"steps": 2, "seeds": (4,)}, r"steps 1 instead of 2, seeds \[0\] instead of \[4\]"),
}


@pytest.mark.parametrize(("settings", "told"), OTHERS.values(), ids=OTHERS.keys())
def test_other_settings_are_recorded_again_and_told(short: Path, settings: dict[str, Any], told: str) -> None:
    before = SourceStatistics.load(short / STATISTICS).recording
    place = rf"in place of what is in .*{STATISTICS}: the statistics given with <potter> were recorded with {told}\."
    fuser = GradientFuser(tiny_pipe(), **SHORT | settings)
    with pytest.warns(MixOfShowWarning, match=place):
        fuser.record(short)
    after = SourceStatistics.load(short / STATISTICS).recording
    assert {name for name in after if after[name] != before[name]} == set(settings)
    with Kept(short):
        fuser.record(short)


def test_statistics_of_another_lora_are_recorded_again_and_told(short: Path) -> None:
    with pytest.warns(
        MixOfShowWarning, match=r"recorded again, in place of .*: .* are of another LoRA .* at scale 0\.5"
    ):
        GradientFuser(tiny_pipe(), **SHORT).record(FusionSource(short, scale=0.5))


def toyland_pipelines() -> Iterator[tuple[str, Callable[[Path], Any]]]:
    folder = Path(location_of("toyland"))
    load = MixOfShowPipeline.from_pretrained
    yield "name", lambda place: load("toyland")
    yield "folder", lambda place: load(folder)
    yield "text of the folder", lambda place: load(f"{folder}/")
    yield "link", lambda place: load(linked(folder, place))
    yield "copy", lambda place: load(shutil.copytree(folder, place / "copied"))
    yield "half precision", lambda place: load("toyland", dtype=torch.float16)
    yield "from_pipe", lambda place: MixOfShowPipeline.from_pipe(load("toyland"))
    yield "saved again", lambda place: saved(load("toyland"), place)
    yield "parts", lambda place: MixOfShowPipeline(**load("toyland").components, requires_safety_checker=False)


def linked(folder: Path, place: Path) -> Path:
    (place / "link").symlink_to(folder)
    return place / "link"


def saved(pipe: Any, place: Path) -> Any:
    pipe.save_pretrained(place / "saved")
    return MixOfShowPipeline.from_pretrained(place / "saved")


@pytest.mark.parametrize(
    "make", [make for _, make in toyland_pipelines()], ids=[name for name, _ in toyland_pipelines()]
)
def test_toyland_is_recorded_at_its_own_guidance(make: Callable[[Path], Any], tmp_path: Path) -> None:
    recording = GradientFuser(make(tmp_path)).recording
    assert (recording.guidance_scale, recording.height, recording.width) == (3.0, 64, 64)


def test_other_bases_are_recorded_at_diffusers_guidance() -> None:
    assert GradientFuser(tiny_pipe()).recording.guidance_scale == 7.5
    assert GradientFuser(MixOfShowPipeline.from_pretrained("toyland"), guidance_scale=5).recording.guidance_scale == 5


@pytest.mark.parametrize("name", ["toyland", location_of("toyland"), f"{location_of('toyland')}/"])
def test_toyland_has_its_guidance_by_any_name(name: str) -> None:
    assert usual_guidance(name) == 3.0


@pytest.mark.parametrize("name", ["", "someone/else", "no/such/folder", "toy land"])
def test_other_names_have_diffusers_guidance(name: str) -> None:
    assert usual_guidance(name) == 7.5


def _cached(place: Path) -> tuple[str, str]:
    snapshot = place / "models--someone--else" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return "someone/else", str(snapshot)


def _from_here(place: Path) -> tuple[str, str]:
    (place / "base").mkdir()
    return str(place / "base"), os.path.relpath(place / "base")


SPELLINGS: dict[str, Callable[[Path], tuple[str, str]]] = {
    "Toyland's folder": lambda place: ("toyland", location_of("toyland")),
    "with a slash": lambda place: ("toyland", f"{location_of('toyland')}/"),
    "a link to it": lambda place: ("toyland", str(linked(Path(location_of("toyland")), place))),
    "a folder of the cache": _cached,
    "a relative path": _from_here,
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_of_one_base_are_one_base(tmp_path: Path, spell: Callable[[Path], tuple[str, str]]) -> None:
    parts = tiny.components()
    sources = [
        replace(packs.random_pack(parts, name), base_model=base)
        for name, base in zip(("rex", "kit"), spell(tmp_path), strict=True)
    ]
    assert len(GradientFuser().fuse(sources, method="average").concepts) == 2
    other = replace(packs.random_pack(parts, "zoe"), base_model="someone/other")
    with pytest.raises(FusionError, match="tuned on different base models"):
        GradientFuser().fuse([*sources, other], method="average")


@pytest.mark.slow
def test_a_client_on_toyland_is_fused_without_recording(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photos" / "0.png")
    folder = tmp_path / "potter"
    settings = {"pretrained_model_name_or_path": "toyland", "save_statistics": True, "output_dir": folder}
    EDLoRATrainer(quick(tmp_path / "photos", **settings, max_train_steps=1, resolution=64)).train()
    recording = SourceStatistics.load(folder / STATISTICS).recording
    assert (recording["guidance_scale"], recording["height"], recording["width"]) == (3.0, 64, 64)
    pipe = MixOfShowPipeline.from_pretrained("toyland")
    with Kept(folder):
        GradientFuser(pipe, sequential=False).fuse([folder])
