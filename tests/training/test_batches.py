"""What a step sees: latents, masks, captions, noise and timesteps, by plain arithmetic beside the draws."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageOps

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.training.batches import Batch, CachedPhoto, RandomBatches, cache_photos
from diffusers_mixofshow.training.company import compose_company
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.data import read_photos
from diffusers_mixofshow.training.framing import bucket_size, crop_photo, frame_photo, place_photo, size_conditions
from diffusers_mixofshow.training.pictures import Photo


def config_of(**settings: object) -> TrainingConfig:
    needed = {"instance_data_dir": "photos", "concept": "potter", "class_word": "man", "resolution": 32}
    return TrainingConfig(**{**needed, **settings})  # type: ignore[arg-type]


def photo_of(
    number: int, *, crops: int = 3, captions: int = 1, deviation: float = 0.0, **fields: object
) -> CachedPhoto:
    """Crop c of photo n has latents n + c / 8, mask 1 + n + c / 8, subject 2 + n + c / 8, and sizes 3 + n + c / 8."""
    values = (number + torch.arange(crops) / 8).view(-1, 1, 1, 1)
    made: dict[str, object] = {
        "mean": values.expand(-1, 4, 2, 2),
        "deviation": torch.full((crops, 4, 2, 2), deviation),
        "mask": (1 + values).expand(-1, 1, 2, 2),
        "subject": (2 + values).expand(-1, 1, 2, 2),
        "sizes": (3 + values[..., 0, 0]).expand(-1, 6),
        "captions": tuple(range(number * captions, (number + 1) * captions)),
    }
    return CachedPhoto(**{**made, **fields})  # type: ignore[arg-type]


def drawn(
    photos: list[CachedPhoto],
    count: int,
    *,
    prior: tuple[CachedPhoto, ...] = (),
    seed: int = 0,
    empty: int | None = None,
    **settings: object,
) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    batches = RandomBatches(
        photos, config_of(**settings), timesteps=100, generator=generator, prior=prior, empty_prompt=empty
    )
    return [next(batches) for _ in range(count)]


def rows_of(batch: Batch) -> list[int]:
    """The caption of every picture."""
    return [batch.captions[int(place)] for place in batch.caption_of]


def test_the_mask_and_the_subject_are_those_of_the_crop_that_is_shown() -> None:
    without = photo_of(5, subject=None)
    batches = drawn([photo_of(0), photo_of(1), without], 40, train_batch_size=3)
    crops = Counter()
    for batch in batches:
        value = batch.latents[:, :1]
        torch.testing.assert_close(batch.mask, 1 + value)
        torch.testing.assert_close(batch.sizes, (3 + value[:, :, 0, 0]).expand(-1, 6))
        has_none = value[:, 0, 0, 0] >= 5
        assert batch.has_subject.tolist() == (~has_none).tolist()
        torch.testing.assert_close(batch.subject, torch.where(has_none.view(-1, 1, 1, 1), 1.0, 2 + value))
        crops.update((8 * (value[:, 0, 0, 0] % 1)).int().tolist())
    assert set(crops) == {0, 1, 2}
    assert min(crops.values()) > 0.2 * sum(crops.values())


def test_latents_are_drawn_from_their_own_distribution() -> None:
    batches = drawn([photo_of(0, deviation=0.5, crops=1), photo_of(3, deviation=2.0, crops=1)], 300)
    for mean, deviation in ((0.0, 0.5), (3.0, 2.0)):
        rows = torch.stack(
            [
                latents
                for batch in batches
                for latents, row in zip(batch.latents, rows_of(batch), strict=True)
                if row == mean
            ]
        )
        torch.testing.assert_close(rows.mean(), torch.tensor(mean), atol=0.1, rtol=0)
        torch.testing.assert_close(rows.std(), torch.tensor(deviation), atol=0, rtol=0.05)


@pytest.mark.parametrize("strength", [0.01, 0.5])
def test_the_noise_offset_is_one_number_a_channel(strength: float) -> None:
    with_offset, without = (
        torch.cat([batch.noise for batch in drawn([photo_of(0)], 200, noise_offset=offset)])
        for offset in (strength, 0.0)
    )
    offset = with_offset - without
    torch.testing.assert_close(offset, offset[..., :1, :1].expand_as(offset), atol=1e-6, rtol=0)
    numbers = offset[..., 0, 0] / strength
    assert abs(float(numbers.mean())) < 0.1
    assert float(numbers.std()) == pytest.approx(1, abs=0.05)
    assert float(without.std()) == pytest.approx(1, abs=0.05)
    assert float(without.mean()) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize(
    ("size", "few", "expected"),
    [(4, None, 4), (4, 4, 4), (4, 9, 4), (4, 3, 3), (5, 2, 2), (3, 1, 1), (1, None, 1)],
)
def test_photos_are_repeated_in_turn_where_there_are_fewer_captions(size: int, few: int | None, expected: int) -> None:
    photos = [photo_of(number) for number in range(3 * expected)]
    for batch in drawn(photos, 3, train_batch_size=size, captions_per_step=few):
        rows = rows_of(batch)
        assert len(rows) == len(batch.latents) == len(batch.timesteps) == len(batch.noise) == size
        assert batch.captions == tuple(dict.fromkeys(rows))
        assert len(batch.captions) == expected
        assert rows == [rows[place % expected] for place in range(size)]
        assert batch.latents[:, 0, 0, 0].int().tolist() == rows
        assert batch.prior_pictures == 0


def test_every_caption_of_a_photo_is_drawn_alike() -> None:
    counts = Counter(row for batch in drawn([photo_of(0, captions=4)], 400) for row in rows_of(batch))
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) < 1.2 * min(counts.values())


def test_the_second_half_shows_the_class_with_its_own_prompt() -> None:
    prior = tuple(photo_of(number, captions=1) for number in (10, 11, 12))
    settings = {"train_batch_size": 3, "captions_per_step": 2}
    seen = []
    for batch in drawn([photo_of(number) for number in range(3)], 4, prior=prior, **settings):
        rows = rows_of(batch)
        assert (batch.prior_pictures, len(batch.latents)) == (3, 6)
        assert all(row < 3 for row in rows[:3])
        seen.append(sorted(rows[3:]))
        assert batch.latents[:, 0, 0, 0].int().tolist() == rows
        for half in (batch.timesteps[:3], batch.timesteps[3:]):  # each spread over the whole range
            assert sorted((half * 3 // 100).tolist()) == [0, 1, 2]
    assert seen == [[10, 11, 12]] * 4


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_share_of_captions_is_left_out(share: float) -> None:
    batches = drawn(
        [photo_of(number) for number in range(4)], 400, empty=99, proportion_empty_prompts=share, train_batch_size=4
    )
    gone = torch.tensor([[row == 99 for row in rows_of(batch)] for batch in batches])
    # All four are left out with a chance of share^4; then the first stays.
    assert float(gone.float().mean()) == pytest.approx(share - share**4 / 4, abs=0.03)
    assert not gone.all(dim=1).any()
    assert float(gone[:, 1:].float().mean()) == pytest.approx(share, abs=0.03)
    for batch, left_out in zip(batches, gone, strict=True):
        shown = batch.latents[:, 0, 0, 0].int().tolist()
        assert [row for row in rows_of(batch) if row != 99] == [
            number for number, is_gone in zip(shown, left_out.tolist(), strict=True) if not is_gone
        ]
    (whole,) = drawn([photo_of(0)], 1, proportion_empty_prompts=share, train_batch_size=4)
    assert set(rows_of(whole)) == {0}


def test_the_state_of_batches_is_a_copy() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = RandomBatches([photo_of(number) for number in range(7)], config_of(), timesteps=100, generator=generator)
    next(batches)
    state = batches.state_dict()
    first = next(batches)
    batches.load_state_dict(state)
    again = next(batches)
    batches.load_state_dict(state)
    assert rows_of(first) == rows_of(again) == rows_of(next(batches))
    torch.testing.assert_close(first.noise, again.noise, rtol=0, atol=0)


def shades(size: tuple[int, int], *, mask: bool = True, path: str = "0.png") -> Photo:
    """From black at the left to white at the right, the mask from top to bottom."""
    width, height = size
    across = Image.fromarray(np.tile(np.linspace(0, 255, width).round().astype(np.uint8), (height, 1)))
    down = Image.fromarray(np.tile(np.linspace(0, 255, height).round().astype(np.uint8)[:, None], (1, width)))
    captions = ("a <potter>", f"<potter> {path}")
    return Photo(path=Path(path), image=across.convert("RGB"), captions=captions, mask=down if mask else None)


@pytest.mark.parametrize("masked", [True, False])
def test_cached_photos_are_what_the_autoencoder_gives(pipeline: StableDiffusionPipeline, masked: bool) -> None:
    vae = pipeline.vae
    photos = [shades((60, 40)), shades((32, 32), mask=False, path="1.png")]
    table = ["", *photos[1].captions, photos[0].captions[1]]
    config = config_of(masked_loss=masked, crop_variants=3, random_flip=True, seed=5)
    wide, square = cache_photos(photos, table, vae, config)
    assert (wide.captions, square.captions) == ((1, 3), (1, 2))
    generator = torch.Generator().manual_seed(5)
    for photo, cached, crops in ((photos[0], wide, 6), (photos[1], square, 2)):
        framed = frame_photo(photo, 32, variants=3, center=False, generator=generator, flip=True)
        assert len(framed) == len(cached.mean) == crops
        for number, crop in enumerate(framed):
            with torch.no_grad():
                latents = vae.encode(crop.pixels[None]).latent_dist
            scale = vae.config.scaling_factor
            torch.testing.assert_close(cached.mean[number], latents.mean[0] * scale)
            torch.testing.assert_close(cached.deviation[number], latents.std[0] * scale)
            cells = crop.mask.view(1, 16, 2, 16, 2).mean(dim=(2, 4))
            if photo.mask is None:
                assert cached.subject is None
            else:
                torch.testing.assert_close(cached.subject[number], cells)
            torch.testing.assert_close(cached.mask[number], cells if masked else torch.ones(1, 16, 16))
            assert cached.sizes[number].tolist() == size_conditions(photo, crop)


def test_latents_are_shifted_and_scaled_as_the_autoencoder_says(pipeline: StableDiffusionPipeline) -> None:
    plain, shifted = [], []
    for shift, found in ((None, plain), (0.25, shifted)):
        pipeline.vae.register_to_config(shift_factor=shift, scaling_factor=2.0)
        found += cache_photos([shades((32, 32))], list(shades((32, 32)).captions), pipeline.vae, config_of())
    torch.testing.assert_close(shifted[0].mean, plain[0].mean - 0.5)
    torch.testing.assert_close(shifted[0].deviation, plain[0].deviation)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_a_crop_stands_where_the_draw_says(size: tuple[int, int], seed: int) -> None:
    across, down = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    crop = crop_photo(shades(size), 30, generator=torch.Generator().manual_seed(seed))
    if size == (90, 30):
        left = across * 60
        expected = torch.linspace(left, left + 29, 30) / 89
        torch.testing.assert_close((crop.pixels[0, 5] + 1) / 2, expected, atol=0.02, rtol=0)
    else:
        top = down * 60
        torch.testing.assert_close(crop.mask[0, :, 5], torch.linspace(top, top + 29, 30) / 89, atol=0.02, rtol=0)
    assert crop.valid.shape == crop.mask.shape == (1, 30, 30)
    assert crop.valid.min() == 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [(80, 40), (40, 80), (64, 64)])
def test_a_placed_photo_stands_where_the_draw_says(size: tuple[int, int], seed: int) -> None:
    shrink, across, down = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
    crop = place_photo(shades(size), 128, generator=torch.Generator().manual_seed(seed))
    longest = 128 * (0.75 + 0.25 * shrink)
    width, height = (round(side * longest / max(size)) for side in size)
    left, top = round((128 - width) * across), round((128 - height) * down)
    expected = torch.zeros(1, 128, 128)
    expected[:, top : top + height, left : left + width] = 1
    assert torch.equal(crop.valid, expected)
    assert (crop.pixels[:, crop.valid[0] == 0] == -1).all()
    inside = crop.mask[0, top : top + height, left + width // 2]
    torch.testing.assert_close(inside, torch.linspace(0, 1, height), atol=0.03, rtol=0)
    row = (crop.pixels[1, top + height // 2, left : left + width] + 1) / 2
    torch.testing.assert_close(row, torch.linspace(0, 1, width), atol=0.05, rtol=0)


def scaled_to_cover(photo: Photo, size: tuple[int, int]) -> Image.Image:
    """The photo as it is before anything is cut off."""
    scale = max(size[0] / photo.image.width, size[1] / photo.image.height)
    width, height = (round(side * scale) for side in photo.image.size)
    return photo.image.resize((width, height), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("framing", ["crop", "buckets"])
@pytest.mark.parametrize("size", [(180, 60), (60, 180), (301, 200), (97, 103), (64, 64), (40, 30), (900, 100)])
def test_what_the_denoiser_is_told_is_what_was_cut_off_of_the_photo(
    size: tuple[int, int], framing: str, center: bool
) -> None:
    """Mirrored ones are crops of the mirrored photo: of it, what was cut off at the right lies at the left."""
    across, down = (np.linspace(0, 255, side) for side in size)
    values = np.stack([np.tile(across, (size[1], 1)), np.tile(down[:, None], (1, size[0])), np.zeros(size[::-1])], -1)
    photo = replace(shades(size, mask=False), image=Image.fromarray(values.round().astype(np.uint8)))
    target = bucket_size(size, 64) if framing == "buckets" else (64, 64)
    settings = {"variants": 3, "center": center, "framing": framing, "flip": True}
    crops = frame_photo(photo, 64, generator=torch.Generator().manual_seed(1), **settings)
    whole, both = scaled_to_cover(photo, target), (False, True)
    for mirrored, part in zip(both, (crops[: len(crops) // 2], crops[len(crops) // 2 :]), strict=True):
        shown = ImageOps.mirror(whole) if mirrored else whole
        for crop in part:
            told = size_conditions(photo, crop)
            assert told == [size[1], size[0], crop.top, crop.left, target[1], target[0]]
            cut = shown.crop((crop.left, crop.top, crop.left + target[0], crop.top + target[1]))
            expected = torch.from_numpy(np.array(cut)).permute(2, 0, 1)[:2].float() / 127.5 - 1
            a_cell = 2.0 / min(whole.size)  # the draw stands between pixels
            torch.testing.assert_close(crop.pixels[:2, 3:-3, 3:-3], expected[:, 3:-3, 3:-3], atol=1.5 * a_cell, rtol=0)


def test_the_true_size_is_told_whatever_training_has_kept_of_a_photo(tmp_path: Path) -> None:
    Image.effect_noise((300, 200), 80).convert("RGB").save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    Image.effect_noise((300, 200), 60).convert("RGB").save(tmp_path / "b.jpg", exif=turned)
    Image.effect_noise((20, 30), 70).convert("RGB").save(tmp_path / "c.png")
    photos = read_photos(tmp_path, Concept.from_name("potter", "man"), resolution=32)
    assert [photo.image.size for photo in photos] == [(96, 64), (64, 96), (20, 30)]
    assert [photo.true_size for photo in photos] == [(300, 200), (200, 300), (20, 30)]
    told = [size_conditions(photo, crop_photo(photo, 32)) for photo in photos]
    assert told == [[200, 300, 0, 8, 32, 32], [300, 200, 8, 0, 32, 32], [30, 20, 8, 0, 32, 32]]
    placed = place_photo(photos[0], 32, generator=torch.Generator().manual_seed(0))
    assert size_conditions(photos[0], placed) == [200, 300, 0, 0, 32, 32]
    masked = [replace(photos[0], mask=Image.new("L", (96, 64), 255))]
    (composed, *_) = compose_company(masked, config_of(company=0.5))
    assert composed.true_size == (200, 200)
    assert size_conditions(composed, crop_photo(composed, 32)) == [200, 200, 0, 0, 32, 32]


@pytest.mark.parametrize("framing", ["crop", "place", "buckets"])
@pytest.mark.parametrize(("center", "flip"), [(False, False), (False, True), (True, True)])
def test_how_many_training_pictures_a_photo_gives(framing: str, center: bool, flip: bool) -> None:
    sizes = {"crop": (64, 64), "place": (64, 64), "buckets": bucket_size((100, 70), 64)}
    made = frame_photo(
        shades((100, 70)),
        64,
        variants=3,
        center=center,
        generator=torch.Generator().manual_seed(0),
        framing=framing,
        flip=flip,
    )
    variants = 1 if center and framing != "place" else 3
    assert len(made) == variants * (2 if flip else 1)
    assert {tuple(crop.pixels.shape) for crop in made} == {(3, *reversed(sizes[framing]))}
    for crop, mirror in zip(made[:variants], made[variants:], strict=False):
        for name in ("pixels", "mask", "valid"):
            assert torch.equal(getattr(crop, name).flip(-1), getattr(mirror, name))
    places = {crop.pixels.numpy().tobytes() for crop in made[:variants]}
    assert len(places) == variants
    if center and framing == "crop":
        assert float(made[0].pixels.mean()) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("framing", ["crop", "buckets"])
def test_a_photo_of_the_pictures_own_shape_has_one_crop(framing: str) -> None:
    width, height = bucket_size((72, 56), 64) if framing == "buckets" else (64, 64)
    photo = shades((2 * width, 2 * height))
    generator = torch.Generator().manual_seed(0)
    (crop,) = frame_photo(photo, 64, variants=5, center=False, generator=generator, framing=framing)
    torch.testing.assert_close((crop.pixels[0, 0] + 1) / 2, torch.linspace(0, 1, width), atol=0.03, rtol=0)


def nearest_bucket(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Of all sizes that a bucket may have: of each width the largest height, and turned round."""
    step = 64 if resolution >= 512 else max(8, resolution // 64 * 8)
    found = []
    for width in range(step, 2 * resolution, step):
        fitting = [h for h in range(step, 2 * resolution, step) if width * h <= resolution**2 and h <= 2 * width]
        if fitting and width * max(fitting) >= 0.75 * resolution**2 and width <= 2 * max(fitting):
            found += [(width, max(fitting)), (max(fitting), width)]
    shape = size[0] / size[1]
    return min(found, key=lambda each: (max(each[0] / each[1] / shape, shape / each[0] * each[1]), -each[0] * each[1]))


@pytest.mark.parametrize("resolution", [32, 64, 128, 200, 256, 448, 512, 576, 640, 768, 1024])
def test_buckets_are_the_nearest_of_all(resolution: int) -> None:
    for width in (1, 2, 3, 5, 7, 8, 11, 16, 23):
        for height in (1, 2, 3, 4, 6, 9, 13, 16):
            found = bucket_size((100 * width, 100 * height), resolution)
            assert found == nearest_bucket((100 * width, 100 * height), resolution), (width, height)
