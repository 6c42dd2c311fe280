"""Pictures composed of photos: the concept at two places, captions that say so, and nothing learnt of the seams."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from diffusers_mixofshow import EDLoRATrainer, MixOfShowWarning
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.training.batches import cache_photos
from diffusers_mixofshow.training.company import compose_company, fill_unknown
from diffusers_mixofshow.training.framing import place_photo
from diffusers_mixofshow.training.pictures import Photo
from short_training import quick, same


GROUND, SUBJECT = (0, 160, 0), (250, 0, 0)


def photo(
    box: tuple[int, int, int, int] | None = (30, 40, 70, 95),
    *,
    caption: str = "a <potter>",
    size: tuple[int, int] = (100, 100),
) -> Photo:
    """A red box on green, with its mask; without a box there is no mask."""
    image, mask = Image.new("RGB", size, GROUND), Image.new("L", size)
    if box is not None:
        for picture, colour in ((image, SUBJECT), (mask, 255)):
            left, top, right, bottom = box
            ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), colour)
    return Photo(path=Path("0.png"), image=image, captions=(caption,), mask=None if box is None else mask)


def red(image: Image.Image) -> np.ndarray:
    return np.asarray(image)[..., 0] > 128


@pytest.mark.parametrize(("share", "count"), [(0.4, 8), (0.5, 12), (0.25, 4), (0.01, 0), (0.9, 108)])
def test_composed_pictures_are_the_share_of_all(tmp_path: Path, share: float, count: int) -> None:
    assert len(compose_company([photo()] * 12, quick(tmp_path, company=share))) == count


def test_the_subject_stands_on_both_sides_and_is_gone_from_the_middle(tmp_path: Path) -> None:
    for composed in compose_company([photo()] * 12, quick(tmp_path, company=0.5)):
        shown = red(composed.image)
        assert composed.image.size == (100, 100)
        assert (shown == (np.asarray(composed.mask) > 128)).mean() > 0.99
        for side in (shown[:, :50], shown[:, 50:]):
            rows = side.any(axis=1).nonzero()[0]
            assert 48 <= len(rows) <= 69  # a height of 0.5 to 0.68
            assert 83 <= rows[-1] <= 97
            assert 0.9 < side.sum() / (len(rows) ** 2 * 40 / 55) < 1.1  # whole, in its own shape
        assert not shown[:20].any()


def test_sizes_and_places_vary_by_the_seed_alone(tmp_path: Path) -> None:
    once, again, other = (
        [(each.image.tobytes(), each.captions) for each in compose_company([photo()] * 12, quick(tmp_path, seed=seed))]
        for seed in (0, 0, 1)
    )
    assert once == again
    assert once != other
    assert len({image for image, _ in once}) == 8


def test_what_its_photo_cuts_off_below_stands_at_the_edge(tmp_path: Path) -> None:
    (first, *_) = compose_company([photo((30, 40, 70, 100))] * 12, quick(tmp_path))
    lowest = red(first.image)[-1]
    assert lowest[:50].any()
    assert lowest[50:].any()


def test_wide_subjects_fit_their_column(tmp_path: Path) -> None:
    for composed in compose_company([photo((5, 60, 95, 90))] * 12, quick(tmp_path)):
        shown = red(composed.image).any(axis=0)
        assert 90 <= shown.sum() <= 98  # two of at most 0.97 columns of 50, and none of the columns is left


def test_a_photo_that_is_not_square_gives_its_middle(tmp_path: Path) -> None:
    (first, *_) = compose_company([photo((80, 40, 120, 95), size=(200, 100))] * 12, quick(tmp_path))
    assert first.image.size == first.mask.size == first.known.size == (100, 100)  # type: ignore[union-attr]


def test_photos_without_masks_are_neither_cut_out_nor_backgrounds(tmp_path: Path) -> None:
    plain = Photo(path=Path("1.png"), image=Image.new("RGB", (100, 100), "blue"), captions=("a <potter>",), mask=None)
    composed = compose_company([plain, photo()] * 6, quick(tmp_path))
    assert len(composed) == 8
    assert not any((np.asarray(each.image)[..., 2] > 128).any() for each in composed)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({}, True), ({"company": 0.0}, False), ({"kind": "scene"}, False), ({"preset": "paper"}, False)],
)
def test_without_masks_nothing_is_composed_and_it_is_said(tmp_path: Path, settings: dict, told: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = quick(tmp_path, **settings)
        assert compose_company([photo(None)] * 3, config) == []
    command = f"`mixofshow masks {config.instance_data_dir} --class-word man` makes them"
    assert [each.category for each in caught] == [MixOfShowWarning] * told
    for words in (command, "any paint program does: a picture of the photo's size"):
        assert all(words in str(each.message) for each in caught)


@pytest.mark.parametrize("settings", [{"company": 0.0}, {"kind": "scene"}, {"preset": "paper"}])
def test_company_can_be_left_out(tmp_path: Path, settings: dict) -> None:
    assert compose_company([photo()] * 12, quick(tmp_path, **settings)) == []


@pytest.mark.parametrize("share", [1.0, 1.5, -0.1])
def test_impossible_shares_are_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigurationError, match="company is"):
        quick(tmp_path, company=share)


@pytest.mark.parametrize(
    ("caption", "before", "after"),
    [
        ("a photo of a <potter> on a beach", "a photo of a <potter>", " on a beach"),
        ("A <potter> man, smiling", "a <potter>", ", smiling"),
        ("the <potter>", "a <potter>", ""),
        ("<potter>, a man, 1boy", "<potter>", ", a man, 1boy"),
        ("photo of <potter> manly", "photo of <potter>", " manly"),
        ("a <potter> and his <potter> cup", "a <potter>", " and his <potter> cup"),
    ],
)
def test_captions_name_both_and_keep_the_rest(tmp_path: Path, caption: str, before: str, after: str) -> None:
    wordings = set()
    for composed in compose_company([photo(caption=caption)] * 12, quick(tmp_path, company=0.8)):
        (said,) = composed.captions
        assert said.lower().startswith(before)
        assert said.endswith(after)
        assert said.count("<potter>") == caption.count("<potter>") + 1
        wordings.add(said)
    assert len(wordings) >= 6  # with the class and without, in several wordings


def test_unknown_pixels_get_the_mean_of_the_known_ones_around() -> None:
    values = np.zeros((3, 5, 1))
    values[:, :2], values[:, 4] = 3, 9
    known = np.ones((3, 5, 1), dtype=bool)
    known[:, 2:4] = False
    filled = fill_unknown(values, known)
    np.testing.assert_array_equal(filled[known], values[known])
    # The squares of 2 hold no known pixel there; that of 4 at the left holds six of 3.
    np.testing.assert_array_equal(filled[:, 2:4], 3)
    assert not fill_unknown(values, np.zeros_like(known)).any()


def test_every_unknown_pixel_takes_its_smallest_square_with_known_ones() -> None:
    """Beside a plain recursion over squares and their quarters, with another value in every pixel."""
    draw = np.random.default_rng(5)
    values, known = draw.normal(size=(7, 10, 2)), draw.random((7, 10, 1)) < 0.15

    def mean_of(top: int, left: int, side: int) -> np.ndarray | None:
        if top >= 7 or left >= 10:
            return None
        if side == 1:
            return values[top, left] if known[top, left] else None
        half = side // 2
        quarters = [mean_of(top + down, left + right, half) for down in (0, half) for right in (0, half)]
        seen = [quarter for quarter in quarters if quarter is not None]
        return np.mean(seen, axis=0) if seen else None

    filled = fill_unknown(values, known)
    for row, column in np.argwhere(~known[..., 0]):
        means = (mean_of(row // side * side, column // side * side, side) for side in (2, 4, 8, 16))
        np.testing.assert_allclose(filled[row, column], next(mean for mean in means if mean is not None))


def test_the_loss_leaves_out_what_no_photo_shows(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    composed = compose_company([photo((13, 6, 51, 38), size=(64, 64))] * 12, quick(tmp_path))
    config = quick(tmp_path, masked_loss=False, resolution=64)
    captions = sorted({caption for each in composed for caption in each.captions})
    for each, cached in zip(composed, cache_photos(composed, captions, pipeline.vae, config), strict=True):
        known = torch.from_numpy(np.array(each.known)) / 255
        cells = torch.nn.functional.adaptive_avg_pool2d(known[None], cached.mask.shape[-2:])
        torch.testing.assert_close(cached.mask[0], cells)
        assert cached.mask.min() == 0


def test_the_loss_leaves_it_out_of_pictures_placed_on_black_as_well(tmp_path: Path) -> None:
    (composed, *_) = compose_company([photo((13, 6, 51, 38), size=(64, 64))] * 12, quick(tmp_path))
    crop = place_photo(composed, 64, generator=torch.Generator().manual_seed(0))
    whole = place_photo(replace(composed, known=None), 64, generator=torch.Generator().manual_seed(0))
    share = float((np.asarray(composed.known) > 0).mean())
    assert share < 0.95
    assert float(crop.valid.sum() / whole.valid.sum()) == pytest.approx(share, abs=0.03)
    assert torch.equal(crop.pixels, whole.pixels)


def test_captions_that_grow_too_long_are_left_out(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    (photos / "0.txt").write_text("a " * 70 + "<TOK>", encoding="utf-8")
    long, without = (EDLoRATrainer(quick(photos, company=share), pipeline).train() for share in (0.8, 0.0))
    assert same(long, without)


def test_training_sees_composed_pictures_and_counts_photos_alone(
    pipeline: StableDiffusionPipeline, photos: Path
) -> None:
    with_company, without = (EDLoRATrainer(quick(photos, company=share), pipeline).train() for share in (0.8, 0.0))
    assert with_company.training["photos"] == without.training["photos"] == 2
    assert not same(with_company, without)


@pytest.mark.parametrize("called", ["<potter1> <potter2>", "<potter1><potter2>", "<potter1>"])
def test_a_concept_called_by_its_tokens_is_named_twice_too(tmp_path: Path, called: str) -> None:
    ours = compose_company([photo(caption=f"a photo of a {called} in a meadow")] * 6, quick(tmp_path, company=0.5))
    theirs = compose_company([photo(caption="a photo of a <potter> in a meadow")] * 6, quick(tmp_path, company=0.5))
    assert [composed.captions for composed in ours] == [composed.captions for composed in theirs]
    assert all(composed.captions[0].count("<potter>") == 2 for composed in ours)


def test_advice_about_a_data_set_of_the_hub_names_it(tmp_path: Path) -> None:
    config = quick(tmp_path, company=0.5, instance_data_dir=None, dataset_name="user/cats")
    with pytest.warns(MixOfShowWarning, match=r"masks FOLDER .* makes them, for a copy of user/cats in FOLDER"):
        compose_company([photo(None)], config)
