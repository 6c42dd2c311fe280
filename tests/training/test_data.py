"""Photos of every kind are read; every file that cannot be used is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.errors import TrainingDataError
from diffusers_mixofshow.training.batches import CachedPhoto, random_batches, spread_timesteps
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.data import Photo, crop_photo, crops_of, mask_on_latents, read_photos


POTTER = Concept.from_name("potter", "man")
_ORIENTATION = 0x0112


def save_photo(path: Path, *, size: tuple[int, int] = (20, 10), mode: str = "RGB") -> None:
    Image.new(mode, size).save(path)


def test_captions_and_masks_are_found(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.png")
    save_photo(tmp_path / "B.JPG")
    (tmp_path / "a.txt").write_text("a <TOK> at school\n\n<potter> in the snow\n", encoding="utf-8")
    (tmp_path / "masks").mkdir()
    Image.new("1", (40, 20), 1).save(tmp_path / "masks" / "a.png")
    capital, small = read_photos(tmp_path, POTTER)
    assert small.captions == ("a <potter> at school", "<potter> in the snow")
    assert small.mask is not None
    assert (small.mask.size, small.mask.getextrema()) == ((20, 10), (255, 255))
    assert capital.mask is None
    assert "a photo of a <potter>" in capital.captions


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (8, 8)).save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    assert read_photos(tmp_path, POTTER)[0].image.mode == "RGB"


def test_sixteen_bits_are_scaled_and_transparency_is_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "glass.png")
    deep, glass = read_photos(tmp_path, POTTER)
    assert deep.image.getpixel((0, 0)) == (100, 100, 100)
    assert glass.image.getpixel((0, 0)) == (255, 255, 255)


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert read_photos(tmp_path, POTTER)[0].image.size == (10, 20)


def test_all_defects_are_in_one_error(tmp_path: Path) -> None:
    for name in ("twice.png", "twice.jpg", "mute.png", "nameless.png", "stranger.png", "thin.png", "dark.png"):
        save_photo(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "mute.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "nameless.txt").write_text("a man", encoding="utf-8")
    (tmp_path / "stranger.txt").write_text("<TOK> and <hermione>", encoding="utf-8")
    (tmp_path / "lost.txt").write_text("<TOK>", encoding="utf-8")
    (tmp_path / "masks").mkdir()
    Image.new("L", (10, 20), 255).save(tmp_path / "masks" / "thin.png")
    Image.new("L", (20, 10), 0).save(tmp_path / "masks" / "dark.png")
    Image.new("L", (20, 10), 255).save(tmp_path / "masks" / "gone.png")
    with pytest.raises(TrainingDataError) as caught:
        read_photos(tmp_path, POTTER)
    message = str(caught.value)
    for expected in (
        "several photos are called 'twice'",
        "broken.png is no readable picture",
        "mute.txt is empty",
        "nameless.txt: 'a man' does not name the concept",
        "stranger.txt: Unknown in the prompt: <hermione>",
        "lost.txt belongs to no photo",
        "masks/thin.png is 10x20, expected the photo's shape, 20x10",
        "masks/dark.png is black",
        "masks/gone.png belongs to no photo",
    ):
        assert expected in message


def test_folder_that_is_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="no folder"):
        read_photos(tmp_path / "nowhere", POTTER)
    with pytest.raises(TrainingDataError, match="has no photos"):
        read_photos(tmp_path, POTTER)


def photo_with_stripe() -> Photo:
    """Black, 30 x 10; the left third is white and is the concept."""
    image = Image.new("RGB", (30, 10))
    image.paste((255, 255, 255), (0, 0, 10, 10))
    return Photo(path=Path("a.png"), image=image, captions=("<potter>",), mask=image.convert("L"))


def test_crops_are_square_and_keep_the_mask_in_place() -> None:
    centre = crop_photo(photo_with_stripe(), 8)
    assert (centre.pixels.shape, centre.mask.shape) == ((3, 8, 8), (1, 8, 8))
    assert centre.pixels.max() < -0.9
    assert centre.mask.max() == 0
    generator = torch.Generator().manual_seed(0)
    crops = crops_of(photo_with_stripe(), 8, variants=6, center=False, generator=generator)
    assert len({round(float(crop.mask.mean()), 2) for crop in crops}) > 2
    for crop in crops:
        torch.testing.assert_close(crop.pixels.mean(dim=0, keepdim=True) / 2 + 0.5, crop.mask, atol=0.3, rtol=0)


def test_square_photos_have_one_crop() -> None:
    photo = Photo(path=Path("a.png"), image=Image.new("RGB", (9, 9)), captions=("<potter>",), mask=None)
    assert len(crops_of(photo, 8, variants=6, center=False, generator=torch.Generator())) == 1


def test_mask_on_latents_averages_and_an_empty_one_counts_everything() -> None:
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, :, :3] = 1
    cells = mask_on_latents(masks, 4, 4)
    assert cells[0, 0, 0].tolist() == [1, 0.5, 0, 0]
    assert (cells[1] == 1).all()


def cached(count: int, captions: int) -> list[CachedPhoto]:
    return [
        CachedPhoto(
            mean=torch.full((1, 4, 2, 2), float(number)),
            deviation=torch.zeros(1, 4, 2, 2),
            mask=torch.ones(1, 1, 2, 2),
            captions=tuple(range(number * captions, (number + 1) * captions)),
        )
        for number in range(count)
    ]


def batch_config(**settings: int) -> TrainingConfig:
    return TrainingConfig(instance_data_dir="photos", concept="potter", class_word="man", **settings)


def test_captions_stay_with_their_photos_and_are_few() -> None:
    config = batch_config(train_batch_size=6, captions_per_step=2)
    batches = random_batches(cached(5, captions=3), config, timesteps=1000, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        batch = next(batches)
        assert len(batch.captions) == 2
        photos = batch.latents[:, 0, 0, 0].long()
        rows = torch.tensor(batch.captions)[batch.caption_of]
        assert torch.equal(rows // 3, photos)


def test_every_photo_is_seen_before_any_again() -> None:
    config = batch_config(train_batch_size=3)
    batches = random_batches(cached(6, captions=1), config, timesteps=1000, generator=torch.Generator().manual_seed(0))
    seen = [int(value) for _ in range(2) for value in next(batches).latents[:, 0, 0, 0]]
    assert sorted(seen) == list(range(6))


def test_timesteps_are_uniform_and_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([spread_timesteps(4, 1000, generator) for _ in range(4000)])
    assert (draws.sort(dim=1).values // 250 == torch.arange(4)).all()
    shares = torch.histc(draws[:, 0].float(), bins=10, min=0, max=1000) / len(draws)
    torch.testing.assert_close(shares, torch.full((10,), 0.1), atol=0.02, rtol=0)
