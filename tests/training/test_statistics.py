"""A client's step: after the tuning, fusion needs neither a model nor the photos."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

import tiny
from diffusers_mixofshow import EDLoRATrainer, GradientFuser, MixOfShowPipeline
from diffusers_mixofshow.fusion.published import SourceStatistics, statistics_path
from diffusers_mixofshow.training import StepReport
from short_training import quick


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photos" / "0.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, MixOfShowPipeline])
def test_statistics_lie_beside_what_was_tuned(
    photos: Path, kind: type[StableDiffusionPipeline], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = kind(**tiny.components(), requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    folder = photos.parent / "out"
    config = quick(photos, max_train_steps=1, output_dir=folder, save_statistics=True)
    edlora = EDLoRATrainer(config, pipeline).train()
    assert capsys.readouterr().err == ""
    statistics = SourceStatistics.load(statistics_path(folder / "edlora.safetensors"))
    assert statistics.digest == edlora.digest
    assert set(statistics.concepts) == {"<potter>"}
    assert type(pipeline) is kind
    fused = GradientFuser().fuse([str(folder)])
    assert set(fused.lora) == set(edlora.lora)


@pytest.mark.parametrize("asked", [False, True])
def test_without_leave_or_a_folder_nothing_is_recorded(photos: Path, asked: bool) -> None:
    pipeline = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    folder = None if asked else photos.parent / "other"
    config = quick(photos, max_train_steps=1, output_dir=folder, save_statistics=asked)
    reports: list[StepReport] = []
    edlora = EDLoRATrainer(config, pipeline, on_step=reports.append).train()
    assert [concept.placeholder for concept in edlora.concepts] == ["<potter>"]
    assert [(report.step, report.total_steps) for report in reports] == [(1, 2), (2, 2)]
    assert not list(photos.parent.rglob("*.statistics.safetensors"))
    assert (folder is not None and (folder / "edlora.safetensors").is_file()) is not asked
