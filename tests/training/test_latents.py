"""Latents on the disk: the same training as from memory, and nothing stale or damaged is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from diffusers_mixofshow import EDLoRATrainer, MixOfShowWarning
from diffusers_mixofshow.errors import FileWriteError
from short_training import quick, same


@pytest.fixture
def encoded(pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures the autoencoder was given, call by call."""
    calls: list[int] = []
    encode = pipeline.vae.encode

    def counting(pixels: torch.Tensor, *rest: Any, **named: Any) -> Any:
        calls.append(len(pixels))
        return encode(pixels, *rest, **named)

    monkeypatch.setattr(pipeline.vae, "encode", counting)
    return calls


def test_training_from_the_disk_learns_the_same(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, encoded: list[int]
) -> None:
    Image.linear_gradient("L").convert("RGB").resize((48, 32)).save(photos / "2.png")
    settings = {"crop_variants": 3, "random_flip": True}
    in_memory = EDLoRATrainer(quick(photos, **settings), pipeline).train()
    written = EDLoRATrainer(quick(photos, **settings, latents_dir=tmp_path / "latents"), pipeline).train()
    encoded.clear()
    read = EDLoRATrainer(quick(photos, **settings, latents_dir=tmp_path / "latents"), pipeline).train()

    assert encoded == []
    assert same(written, in_memory)
    assert same(read, in_memory)


@pytest.mark.parametrize("change", ["photo", "resolution", "autoencoder"])
def test_what_has_changed_is_encoded_anew(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, encoded: list[int], change: str
) -> None:
    kept = {"latents_dir": tmp_path / "latents"}
    EDLoRATrainer(quick(photos, **kept), pipeline).train()
    if change == "photo":
        Image.new("RGB", (32, 32), "green").save(photos / "1.png")
    if change == "autoencoder":
        with torch.no_grad():
            next(pipeline.vae.encoder.parameters()).mul_(2)
    size = {"resolution": 64} if change == "resolution" else {}
    encoded.clear()
    read = EDLoRATrainer(quick(photos, **size, **kept), pipeline).train()

    assert len(encoded) == (1 if change == "photo" else 2)
    assert same(read, EDLoRATrainer(quick(photos, **size), pipeline).train())


def test_one_autoencoder_in_two_folders_is_one(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    names = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        pipeline.vae.save_pretrained(folder)
        pipeline.vae = AutoencoderKL.from_pretrained(folder)
        EDLoRATrainer(quick(photos, latents_dir=tmp_path / "latents"), pipeline).train()
        names.append({path.name for path in (tmp_path / "latents").iterdir()})
    assert names[0] == names[1]


def test_damaged_and_foreign_files_are_replaced_with_a_warning(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    config = quick(photos, latents_dir=tmp_path / "latents")
    before = EDLoRATrainer(config, pipeline).train()
    one, other = sorted((tmp_path / "latents").iterdir())
    one.write_bytes(other.read_bytes())
    other.write_bytes(other.read_bytes()[:-7])
    with pytest.warns(MixOfShowWarning, match="computed again") as told:
        again = EDLoRATrainer(config, pipeline).train()

    assert sum("computed again" in str(each.message) for each in told) == 2
    assert same(again, before)
    assert same(EDLoRATrainer(config, pipeline).train(), before)


def test_a_folder_that_cannot_be_written_is_one_error(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(FileWriteError, match="taken"):
        EDLoRATrainer(quick(photos, latents_dir=tmp_path / "taken"), pipeline).train()
