"""Photos of every kind are read; every file that cannot be used is named."""

from __future__ import annotations

import json
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.errors import ConfigurationError, HubError, MixOfShowWarning, TrainingDataError
from diffusers_mixofshow.training import hub_data
from diffusers_mixofshow.training.batches import CachedPhoto, RandomBatches, spread_timesteps
from diffusers_mixofshow.training.captions import shuffle_tags
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.data import load_photos, read_photos
from diffusers_mixofshow.training.framing import average_mask, bucket_size, crop_photo, frame_photo
from diffusers_mixofshow.training.pictures import Photo


POTTER = Concept.from_name("potter", "man")
_ORIENTATION = 0x0112


def save_photo(path: Path, *, size: tuple[int, int] = (20, 10), mode: str = "RGB") -> None:
    Image.new(mode, size).save(path)


def save_noise(path: Path, *, size: tuple[int, int] = (64, 48), seed: int = 0, **settings: object) -> None:
    """A picture like no other, in the format that the name ends in."""
    draws = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(draws).resize(size).save(path, **settings)  # type: ignore[arg-type]


def test_captions_and_masks_are_found(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.png")
    save_noise(tmp_path / "B.JPG", size=(20, 10))
    (tmp_path / "a.txt").write_text("a <TOK> at school\n\n<potter> in the snow\n", encoding="utf-8")
    (tmp_path / "masks").mkdir()
    Image.new("1", (40, 20), 1).save(tmp_path / "masks" / "a.png")
    capital, small = read_photos(tmp_path, POTTER)
    assert small.captions == ("a <potter> at school", "<potter> in the snow")
    assert small.mask is not None
    assert (small.mask.size, small.mask.getextrema()) == ((20, 10), (255, 255))
    assert capital.mask is None
    assert "a photo of a <potter>" in capital.captions


@pytest.mark.filterwarnings("ignore:Photos in")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (8, 8)).save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    assert read_photos(tmp_path, POTTER)[0].image.mode == "RGB"


@pytest.mark.filterwarnings("ignore:Photos in")
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
    with pytest.raises(ConfigurationError, match="no folder"):
        read_photos(tmp_path / "nowhere", POTTER)
    with pytest.raises(TrainingDataError, match="has no photos"):
        read_photos(tmp_path, POTTER)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif", ".gif", ".JPEG"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    save_noise(tmp_path / f"a{suffix}")
    (photo,) = read_photos(tmp_path, POTTER)
    assert (photo.image.mode, photo.image.size, photo.mask) == ("RGB", (64, 48), None)


def test_heic_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_noise(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.HEIC")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(TrainingDataError, match=r"a\.HEIC is HEIC, which needs pillow-heif"):
        read_photos(tmp_path, POTTER)

    def open_heif(path: Path) -> types.SimpleNamespace:
        return types.SimpleNamespace(to_pillow=lambda: Image.open(path))

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(open_heif=open_heif))
    assert read_photos(tmp_path, POTTER)[0].image.size == (64, 48)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(("highest", "said"), [(1, "alpha of 0 and 1;"), (2, "alpha of 0 and 2;")])
def test_a_photo_of_which_nothing_can_be_seen_is_an_error(
    tmp_path: Path, highest: int, said: str, with_mask: bool
) -> None:
    save_noise(tmp_path / "cut.png", size=(8, 8), seed=0)
    image = Image.open(tmp_path / "cut.png").convert("RGBA")
    alpha = Image.new("L", (8, 8), 0)
    alpha.paste(highest, (2, 2, 6, 6))
    image.putalpha(alpha)
    image.save(tmp_path / "cut.png")
    if with_mask:
        (tmp_path / "masks").mkdir()
        Image.new("L", (8, 8), 255).save(tmp_path / "masks" / "cut.png")
    with pytest.raises(TrainingDataError, match=rf"cut\.png would be a white sheet: it has an {said} save it with"):
        read_photos(tmp_path, POTTER)


def test_alpha_is_the_mask_unless_there_is_another(tmp_path: Path) -> None:
    for number, name in enumerate(("cut", "both")):
        save_noise(tmp_path / f"{name}.png", size=(8, 8), seed=number)
        image = Image.open(tmp_path / f"{name}.png").convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize((8, 8)))
        image.save(tmp_path / f"{name}.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 250, 0, 0])
    palette.paste(0, (0, 0, 8, 4))
    palette.save(tmp_path / "palette.png", transparency=0)
    (tmp_path / "masks").mkdir()
    Image.new("L", (8, 8), 255).save(tmp_path / "masks" / "both.webp", lossless=True)
    both, cut, from_palette = read_photos(tmp_path, POTTER)
    assert both.mask is not None
    assert both.mask.getextrema() == (255, 255)
    assert cut.mask is not None
    assert cut.mask.getpixel((0, 7)) > cut.mask.getpixel((0, 0))
    assert from_palette.mask is not None
    assert [from_palette.mask.getpixel((0, y)) for y in (0, 7)] == [0, 255]
    assert [from_palette.image.getpixel((0, y)) for y in (0, 7)] == [(255, 255, 255), (250, 0, 0)]


def write_metadata(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    if name.endswith(".jsonl"):
        text = "\n".join(json.dumps(row) for row in rows)
    else:
        text = "\n".join([",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)])
    (folder / name).write_text(text + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_and_masks_from_metadata(tmp_path: Path, name: str) -> None:
    (tmp_path / "deep").mkdir()
    for number, photo in enumerate(("a.png", "deep/b.jpg")):
        save_noise(tmp_path / photo, seed=number)
    Image.new("L", (64, 48), 255).save(tmp_path / "deep" / "white.png")
    rows = [
        {"file_name": "a.png", "text": "a <TOK>, outdoors", "mask_file_name": ""},
        {"file_name": "deep/b.jpg", "text": "<potter>", "mask_file_name": "deep/white.png"},
        {"file_name": "a.png", "text": "<TOK> again", "mask_file_name": ""},
    ]
    write_metadata(tmp_path, name, rows)
    first, second = read_photos(tmp_path, POTTER)
    assert (first.captions, first.mask) == (("a <potter>, outdoors", "<potter> again"), None)
    assert second.captions == ("<potter>",)
    assert second.mask is not None


def test_metadata_of_another_column_or_none(tmp_path: Path) -> None:
    save_noise(tmp_path / "a.png")
    write_metadata(tmp_path, "metadata.jsonl", [{"file_name": "a.png", "prompt": ["<TOK> one", "<TOK> two"]}])
    assert read_photos(tmp_path, POTTER, caption_column="prompt")[0].captions == ("<potter> one", "<potter> two")
    captions = read_photos(tmp_path, POTTER, caption_column=None, templates=["my <TOK>"])[0].captions
    assert captions == ("my <potter>",)
    with pytest.raises(TrainingDataError, match=r"there is no 'text' \(there is prompt\)"):
        read_photos(tmp_path, POTTER)


@pytest.mark.parametrize(
    "leaving", ["../secret.png", "/etc/secret.png", "C:\\secret.png", "x/../../secret.png", "..\\s.png"]
)
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, leaving: str) -> None:
    save_noise(tmp_path / "secret.png")
    folder = tmp_path / "photos"
    folder.mkdir()
    save_noise(folder / "a.png")
    rows: list[dict[str, object]] = [
        {"file_name": leaving, "text": "<TOK>"},
        {"file_name": "a.png", "text": "<TOK>", "mask_file_name": leaving},
    ]
    write_metadata(folder, "metadata.jsonl", rows)
    with pytest.raises(TrainingDataError) as caught:
        read_photos(folder, POTTER)
    assert "line 1: 'file_name' is" in str(caught.value)
    assert "line 2: 'mask_file_name' is" in str(caught.value)
    assert str(caught.value).count("leaves the folder") == 2


def test_defects_of_metadata_are_in_the_same_error(tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        save_noise(tmp_path / f"{name}.png", seed=number)
    (tmp_path / "a.txt").write_text("<TOK>", encoding="utf-8")
    rows = [
        {"file_name": "a.png", "text": "<TOK>"},
        {"file_name": "b.png", "text": "a man"},
        {"file_name": "gone.png", "text": "<TOK>"},
        {"file_name": "c.png", "text": 5},
        {"text": "<TOK>"},
    ]
    write_metadata(tmp_path, "metadata.jsonl", rows)
    with (tmp_path / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write("{no json\n[]\n")
    with pytest.raises(TrainingDataError) as caught:
        read_photos(tmp_path, POTTER)
    for expected in (
        "a.png has captions in a.txt and in metadata.jsonl",
        "'a man' does not name the concept",
        "metadata.jsonl lists gone.png, which is not there",
        "metadata.jsonl, line 4: 'text' is 5",
        "line 5: there is no 'file_name'",
        "line 6: no JSON",
        "line 7: expected an object",
    ):
        assert expected in str(caught.value)
    (tmp_path / "metadata.csv").write_text("file_name,text\n", encoding="utf-8")
    with pytest.raises(TrainingDataError, match="are both there"):
        read_photos(tmp_path, POTTER)


def test_slips_are_one_warning_and_part_of_an_error(tmp_path: Path) -> None:
    save_noise(tmp_path / "a.png", size=(640, 480))
    save_noise(tmp_path / "a2.jpg", size=(320, 240), quality=80)
    save_noise(tmp_path / "small.png", size=(64, 64), seed=1)
    Image.new("L", (256, 256)).save(
        tmp_path / "moving.gif", save_all=True, append_images=[Image.new("L", (256, 256), 200)]
    )
    (tmp_path / "film.mp4").write_bytes(b"")
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / "README.md").write_bytes(b"")
    with pytest.warns(MixOfShowWarning) as caught:
        read_photos(tmp_path, POTTER, resolution=512)
    (warning,) = caught
    expected = (
        "a2.jpg shows the same as a.png",
        "training enlarges 2 of 4 photos more than 2 times: ",
        "a2.jpg is 320x240 pixels (2.1 times), small.png is 64x64 pixels (8.0 times)",
        "moving.gif has 2 frames",
        "film.mp4 is of no known use",
    )
    assert [text for text in expected if text not in str(warning.message)] == []
    assert "DS_Store" not in str(warning.message)
    assert "README" not in str(warning.message)
    (tmp_path / "broken.jpg").write_bytes(b"")
    with pytest.raises(TrainingDataError) as refused:
        read_photos(tmp_path, POTTER, resolution=512)
    assert [text for text in (*expected, "broken.jpg is no readable picture") if text not in str(refused.value)] == []


def test_many_small_photos_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    for number in range(5):
        save_noise(tmp_path / f"{number}.png", size=(64, 64), seed=number)
    with pytest.warns(MixOfShowWarning, match="enlarges 5 of 5 photos") as caught:
        read_photos(tmp_path, POTTER, resolution=512)
    text = str(caught[0].message)
    assert text.endswith("2.png is 64x64 pixels (8.0 times) and 2 more.")


def test_large_photos_are_scaled_down_with_their_masks(tmp_path: Path) -> None:
    save_noise(tmp_path / "a.png", size=(400, 300))
    (tmp_path / "masks").mkdir()
    Image.new("L", (200, 150), 255).save(tmp_path / "masks" / "a.png")
    (photo,) = read_photos(tmp_path, POTTER, resolution=50)
    assert photo.mask is not None
    assert (photo.image.size, photo.mask.size) == ((133, 100), (133, 100))
    assert read_photos(tmp_path, POTTER)[0].image.size == (400, 300)


def test_photos_that_are_fine_give_no_warning(tmp_path: Path) -> None:
    for number in range(3):
        save_noise(tmp_path / f"{number}.png", seed=number)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_photos(tmp_path, POTTER, resolution=64)


def test_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(TrainingDataError, match="Check who may read it"):
        read_photos(tmp_path, POTTER)


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train").mkdir()
    save_noise(tmp_path / "train" / "a.png")
    write_metadata(tmp_path / "train", "metadata.csv", [{"file_name": "a.png", "text": "<TOK>, red, round, big"}])
    asked: list[tuple[object, ...]] = []

    def snapshot(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((name, repo_type, "*.py" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub_data, "snapshot_download", snapshot)
    config = TrainingConfig(
        dataset_name="me/potter", concept="potter", class_word="man", resolution=64, tag_shuffles=3
    )
    (photo,) = load_photos(config)
    assert asked == [("me/potter", "dataset", False)]
    assert len(set(photo.captions)) == 3
    assert "me/potter" not in str(config.as_record())


def test_a_data_set_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = TrainingConfig(dataset_name="not a name", concept="potter", class_word="man")
    with pytest.raises(HubError, match="expected the form user/name"):
        load_photos(config)


def test_shuffled_tags_keep_the_first_and_all_captions_count_alike() -> None:
    captions = ("<potter>, in the snow, smiling, with an owl", "a photo of a <potter>")
    shuffled = shuffle_tags(captions, 4, seed=0)
    assert shuffle_tags(captions, 0, seed=0) == captions
    assert shuffle_tags(captions, 4, seed=0) == shuffled
    assert shuffle_tags(captions, 4, seed=1) != shuffled
    tags = [caption.split(", ") for caption in shuffled if ", " in caption]
    assert len({tuple(each) for each in tags}) == 4
    assert {each[0] for each in tags} == {"<potter>"}
    assert {tuple(sorted(each[1:])) for each in tags} == {("in the snow", "smiling", "with an owl")}
    assert shuffled.count("a photo of a <potter>") == 4
    assert len(set(shuffle_tags(captions[:1], 100, seed=0))) == 6


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
    crops = frame_photo(photo_with_stripe(), 8, variants=6, center=False, generator=generator)
    assert len({round(float(crop.mask.mean()), 2) for crop in crops}) > 2
    for crop in crops:
        torch.testing.assert_close(crop.pixels.mean(dim=0, keepdim=True) / 2 + 0.5, crop.mask, atol=0.3, rtol=0)


def test_placed_photos_are_whole_and_their_frame_is_not_valid() -> None:
    generator = torch.Generator().manual_seed(0)
    for crop in frame_photo(photo_with_stripe(), 32, variants=8, center=False, generator=generator, framing="place"):
        inside = crop.valid.sum() / 3  # a third of the photo is the concept
        assert 0.5 * 0.75**2 / 3 * 32**2 < crop.valid.sum() <= 32**2 / 3 + 32
        torch.testing.assert_close(crop.mask.sum(), inside, rtol=0.2, atol=0)
        assert (crop.mask <= crop.valid).all()
        assert (crop.pixels[:, crop.valid[0] == 0] == -1).all()
        white = (crop.pixels.mean(dim=0) > 0.5).float()
        torch.testing.assert_close(white.sum(), crop.mask.sum(), rtol=0.3, atol=0)


def test_flips_add_the_mirror_image() -> None:
    generator = torch.Generator().manual_seed(0)
    plain, flipped = frame_photo(photo_with_stripe(), 9, variants=1, center=True, generator=generator, flip=True)
    assert torch.equal(plain.pixels.flip(-1), flipped.pixels)
    assert torch.equal(plain.mask.flip(-1), flipped.mask)


@pytest.mark.parametrize(
    ("size", "resolution", "bucket"),
    [
        ((1000, 1000), 512, (512, 512)),
        ((1000, 1500), 512, (384, 640)),
        ((3000, 2000), 512, (640, 384)),
        ((100, 900), 512, (320, 640)),
        ((900, 100), 512, (640, 320)),
        ((64, 48), 64, (72, 56)),
        ((10, 10), 768, (768, 768)),
    ],
)
def test_buckets(size: tuple[int, int], resolution: int, bucket: tuple[int, int]) -> None:
    found = bucket_size(size, resolution)
    assert found == bucket
    assert found[0] * found[1] <= resolution**2


def test_square_photos_have_one_crop() -> None:
    photo = Photo(path=Path("a.png"), image=Image.new("RGB", (9, 9)), captions=("<potter>",), mask=None)
    assert len(frame_photo(photo, 8, variants=6, center=False, generator=torch.Generator())) == 1


def test_mask_on_latents_averages_and_an_empty_one_counts_everything() -> None:
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, :, :3] = 1
    cells = average_mask(masks, 4, 4)
    assert cells[0, 0, 0].tolist() == [1, 0.5, 0, 0]
    assert (cells[1] == 1).all()


def cached(count: int, captions: int) -> list[CachedPhoto]:
    return [
        CachedPhoto(
            mean=torch.full((1, 4, 2, 2), float(number)),
            deviation=torch.zeros(1, 4, 2, 2),
            mask=torch.ones(1, 1, 2, 2),
            subject=None,
            sizes=torch.zeros(1, 6),
            captions=tuple(range(number * captions, (number + 1) * captions)),
        )
        for number in range(count)
    ]


def batch_config(**settings: float) -> TrainingConfig:
    return TrainingConfig(instance_data_dir="photos", concept="potter", class_word="man", **settings)  # type: ignore[arg-type]


def test_captions_stay_with_their_photos_and_are_few() -> None:
    config = batch_config(train_batch_size=6, captions_per_step=2)
    batches = RandomBatches(cached(5, captions=3), config, timesteps=1000, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        batch = next(batches)
        assert len(batch.captions) == 2
        photos = batch.latents[:, 0, 0, 0].long()
        rows = torch.tensor(batch.captions)[batch.caption_of]
        assert torch.equal(rows // 3, photos)


def test_every_photo_is_seen_before_any_again() -> None:
    config = batch_config(train_batch_size=3)
    batches = RandomBatches(cached(6, captions=1), config, timesteps=1000, generator=torch.Generator().manual_seed(0))
    seen = [int(value) for _ in range(2) for value in next(batches).latents[:, 0, 0, 0]]
    assert sorted(seen) == list(range(6))


def test_timesteps_are_uniform_and_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([spread_timesteps(4, 1000, generator) for _ in range(4000)])
    assert (draws.sort(dim=1).values // 250 == torch.arange(4)).all()
    shares = torch.histc(draws[:, 0].float(), bins=10, min=0, max=1000) / len(draws)
    torch.testing.assert_close(shares, torch.full((10,), 0.1), atol=0.02, rtol=0)


def test_batches_have_photos_of_one_size() -> None:
    wide = [
        CachedPhoto(
            mean=torch.full((1, 4, 2, 3), float(number)),
            deviation=torch.zeros(1, 4, 2, 3),
            mask=torch.ones(1, 1, 2, 3),
            subject=None,
            sizes=torch.zeros(1, 6),
            captions=(number,),
        )
        for number in (3, 4, 5)
    ]
    config = batch_config(train_batch_size=2)
    photos = cached(3, captions=1) + wide
    batches = RandomBatches(photos, config, timesteps=1000, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([next(batches).latents[:, 0, 0, 0].tolist() for _ in range(300)])
    assert ((seen > 2).all(dim=1) | (seen < 3).all(dim=1)).all()
    torch.testing.assert_close(torch.bincount(seen.flatten().long()) / 600, torch.full((6,), 1 / 6), atol=0.04, rtol=0)


def test_some_captions_are_left_out_but_one_stays() -> None:
    config = batch_config(train_batch_size=4, proportion_empty_prompts=0.5)
    batches = RandomBatches(
        cached(4, captions=1), config, timesteps=1000, generator=torch.Generator().manual_seed(0), empty_prompt=4
    )
    drawn = [next(batches) for _ in range(200)]
    left_out = torch.stack([torch.tensor(batch.captions)[batch.caption_of] == 4 for batch in drawn])
    assert not left_out.all(dim=1).any()
    assert abs(float(left_out.float().mean()) - 0.5) < 0.05


def test_batches_of_several_sizes_go_on_where_they_stopped() -> None:
    config = batch_config(train_batch_size=2, proportion_empty_prompts=0.5)
    wide = CachedPhoto(
        mean=torch.zeros(2, 4, 2, 3),
        deviation=torch.ones(2, 4, 2, 3),
        mask=torch.ones(2, 1, 2, 3),
        subject=None,
        sizes=torch.zeros(2, 6),
        captions=(0,),
    )

    def batches(seed: int) -> RandomBatches:
        photos = [*cached(3, captions=1), wide]
        generator = torch.Generator().manual_seed(seed)
        return RandomBatches(photos, config, timesteps=1000, generator=generator, empty_prompt=3)

    first, again = batches(0), batches(1)
    for _ in range(5):
        next(first)
    again.load_state_dict(first.state_dict())
    for _ in range(20):
        one, other = next(first), next(again)
        assert torch.equal(one.latents, other.latents)
        assert (one.captions, one.timesteps.tolist()) == (other.captions, other.timesteps.tolist())
