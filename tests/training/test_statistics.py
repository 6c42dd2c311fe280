"""A client's step: after the tuning, fusion needs neither a model nor the photos."""

from __future__ import annotations

from pathlib import Path

from diffusers import StableDiffusionPipeline

import tiny
from diffusers_mixofshow import EDLoRATrainer, GradientFuser
from diffusers_mixofshow.fusion.published import SourceStatistics, statistics_path
from short_training import quick


def test_statistics_lie_beside_what_was_tuned(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photos" / "0.png")
    pipeline = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    folder = tmp_path / "out"
    config = quick(tmp_path / "photos", max_train_steps=1, output_dir=folder, save_statistics=True)
    edlora = EDLoRATrainer(config, pipeline).train()
    statistics = SourceStatistics.load(statistics_path(folder / "edlora.safetensors"))
    assert statistics.digest == edlora.digest
    assert set(statistics.concepts) == {"<potter>"}
    assert type(pipeline) is StableDiffusionPipeline
    fused = GradientFuser().fuse([str(folder)])
    assert set(fused.lora) == set(edlora.lora)
    without = quick(tmp_path / "photos", max_train_steps=1, output_dir=tmp_path / "other", save_statistics=False)
    EDLoRATrainer(without, pipeline).train()
    assert not statistics_path(tmp_path / "other" / "edlora.safetensors").exists()
