"""Every setting about data reaches the training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import tiny
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.training import EDLoRATrainer, TrainingConfig
from diffusers_mixofshow.training.batches import cache_photos
from diffusers_mixofshow.training.data import read_photos


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A wide, a high and a square photo; the wide one has a mask."""
    folder = tmp_path / "photos"
    (folder / "masks").mkdir(parents=True)
    for colour, size in {"red": (64, 32), "blue": (32, 64), "green": (48, 48)}.items():
        Image.new("RGB", size, colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text("a <TOK>, one, two, three", encoding="utf-8")
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 32, 32))
    mask.save(folder / "masks" / "red.png")
    return folder


def config(photos: Path, **settings: object) -> TrainingConfig:
    quick: dict[str, object] = {
        "instance_data_dir": str(photos),
        "concept": "potter",
        "class_word": "man",
        "resolution": 32,
        "max_train_steps": 2,
        "embedding_phase_steps": 1,
        "train_batch_size": 2,
        "num_validation_images": 0,
    }
    return TrainingConfig.from_mapping(quick | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"framing": "buckets", "random_flip": True},
        {"framing": "place", "masked_loss": False},
        {"proportion_empty_prompts": 0.6, "tag_shuffles": 3},
    ],
)
def test_training_runs_with(photos: Path, settings: dict[str, object]) -> None:
    pipeline = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    edlora = EDLoRATrainer(config(photos, **settings), pipeline).train()
    assert edlora.training["final_loss"] > 0  # type: ignore[operator]
    assert all(torch.isfinite(value).all() for value in edlora.embeddings.values())


def test_latents_follow_the_framing(photos: Path) -> None:
    vae = tiny.components()["vae"]
    read = read_photos(photos, Concept.from_name("potter", "man"))
    table = sorted({caption for photo in read for caption in photo.captions})
    shapes = {
        framing: {
            tuple(photo.mean.shape[-2:]) for photo in cache_photos(read, table, vae, config(photos, framing=framing))
        }  # type: ignore[arg-type]
        for framing in ("crop", "place", "buckets")
    }
    assert shapes == {"crop": {(16, 16)}, "place": {(16, 16)}, "buckets": {(16, 16), (20, 12), (12, 20)}}


@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_leaves_out_what_is_no_photo(photos: Path, masked: bool) -> None:
    vae = tiny.components()["vae"]
    read = read_photos(photos, Concept.from_name("potter", "man"))
    table = sorted({caption for photo in read for caption in photo.captions})
    settings = config(photos, framing="place", masked_loss=masked)
    of_blue, _, of_red = cache_photos(read, table, vae, settings)  # type: ignore[arg-type]
    assert 0.2 < of_blue.mask.mean() < 0.55
    share = of_red.mask.mean() / of_blue.mask.mean()
    assert share < 0.8 if masked else share > 0.7


@pytest.mark.parametrize("share", [0.99, 0.0])
def test_a_share_of_the_captions_that_are_encoded_is_empty(photos: Path, share: float) -> None:
    pipeline = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    empty = pipeline.tokenizer("", padding="max_length").input_ids
    seen: list[list[int]] = []

    def note(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if given[0].shape[-1] == len(empty):  # a whole text, and not single words
            seen.extend(given[0].reshape(-1, len(empty)).tolist())

    pipeline.text_encoder.get_input_embeddings().register_forward_pre_hook(note)
    settings = config(photos, proportion_empty_prompts=share, captions_per_step=2, save_statistics=False)
    EDLoRATrainer(settings, pipeline).train()
    assert (empty in seen) is (share > 0)
    assert any(row != empty for row in seen)
