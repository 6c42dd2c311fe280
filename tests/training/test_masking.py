"""Masks for photos that have none: from a drawn map, and written where training looks for them."""

from __future__ import annotations

import socket
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from diffusers_mixofshow import Concept, make_masks
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowWarning, OverwriteError, TrainingDataError
from diffusers_mixofshow.sheets import draw_labelled_sheet
from diffusers_mixofshow.training.data import read_photos
from diffusers_mixofshow.training.finding import Finder
from diffusers_mixofshow.training.masking import MadeMask
from diffusers_mixofshow.training.outlines import outline


SIDE = 40


def drawn(*boxes: tuple[int, int, int, int], high: float = 0.9, low: float = 0.02, holes: tuple = ()) -> np.ndarray:
    """A map with boxes (left, top, right, bottom) that are likely, and holes in them that are not."""
    values = np.full((SIDE, SIDE), low)
    for value, places in ((high, boxes), (low, holes)):
        for left, top, right, bottom in places:
            values[top:bottom, left:right] = value
    return values


def inside(values: np.ndarray, **more: float) -> np.ndarray:
    return np.asarray(outline(values, (SIDE, SIDE), **more).mask) > 128


def box(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    return drawn((left, top, right, bottom)) > 0.5


TALL = (8, 5, 20, 35)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (drawn(TALL), box(*TALL)),
        (drawn(TALL, high=0.3), box(*TALL)),  # an unsure model still knows where most of it is
        (drawn(TALL, (30, 5, 34, 9)), box(*TALL)),  # a crumb is left out
        (drawn((30, 5, 34, 9), TALL), box(*TALL)),
        (drawn(TALL, (20, 35, 24, 38)), box(*TALL) | box(20, 35, 24, 38)),  # parts that meet at a corner are one
        (drawn(TALL, holes=((12, 12, 15, 15),)), box(*TALL)),  # a small hole is filled
        (drawn(TALL, holes=((10, 8, 18, 32),)), box(*TALL) & ~box(10, 8, 18, 32)),  # one to see through is not
        (drawn(TALL, holes=((8, 12, 11, 15),)), box(*TALL) & ~box(8, 12, 11, 15)),  # nor is a dent
        (drawn((0, 0, 20, 40), holes=((0, 10, 3, 13),)), box(0, 0, 20, 40) & ~box(0, 10, 3, 13)),  # the photo's edge
        (drawn((0, 0, 40, 20)), box(0, 0, 40, 20)),
    ],
)
def test_the_largest_part_is_cut_out_and_small_holes_are_filled(values: np.ndarray, expected: np.ndarray) -> None:
    found = outline(values, (SIDE, SIDE))
    assert (np.asarray(found.mask) > 128).tolist() == expected.tolist()
    assert set(np.unique(found.mask)) <= {0, 255}
    assert (found.share, found.defect, found.remark) == (expected.mean(), "", "")


def test_the_threshold_is_a_part_of_the_likeliest_place() -> None:
    values = drawn((5, 5, 35, 35), high=0.4)
    values[10:30, 10:30] = 0.8
    assert inside(values, threshold=0.6).sum() == 20 * 20
    assert inside(values, threshold=0.4).sum() == 30 * 30
    assert inside(values / 4, threshold=0.6).sum() == 20 * 20


@pytest.mark.parametrize("size", [(40, 40), (400, 100), (30, 90), (7, 5), (1200, 900)])
def test_a_mask_is_as_large_as_its_photo_whatever_its_shape(size: tuple[int, int]) -> None:
    found = outline(drawn((0, 0, 20, 40)), size)
    assert (found.mask.mode, found.mask.size) == ("L", size)
    columns = np.asarray(found.mask).mean(axis=0) / 255
    assert columns[: round(0.45 * size[0])].min() == 1
    assert columns[round(0.55 * size[0]) :].max(initial=0) == 0


def test_a_slanted_edge_has_no_steps_of_the_maps_size() -> None:
    """Likelihoods are made larger before they are cut, not afterwards."""
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    values = 1 / (1 + np.exp(12 * (columns - rows)))
    widths = (np.asarray(outline(values, (400, 400)).mask) > 128).sum(axis=1)
    assert np.diff(widths)[40:-40].max() <= 2


@pytest.mark.parametrize(
    ("values", "defect", "remark"),
    [
        (drawn(low=0.0), "nothing of its kind", ""),
        (drawn(low=0.02), "nothing of its kind", ""),
        (drawn((5, 5, 8, 8)), "only 0.6%", ""),
        (drawn((0, 0, 40, 39)), "nearly everything, 98%", ""),
        (drawn(low=0.9), "nearly everything, 100%", ""),
        (drawn((5, 5, 10, 10)), "", ""),
        (drawn((0, 0, 40, 37)), "", ""),
        (drawn(TALL, (25, 5, 35, 35)), "", "more than one"),
        (drawn(TALL, (25, 5, 31, 35)), "", "more than one"),  # half as large
        (drawn(TALL, (25, 5, 30, 35)), "", ""),
    ],
)
def test_what_is_no_subject_to_cut_out_is_said(values: np.ndarray, defect: str, remark: str) -> None:
    found = outline(values, (SIDE, SIDE))
    assert defect in found.defect
    assert remark in found.remark
    assert (bool(found.defect), bool(found.remark)) == (bool(defect), bool(remark))


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory) -> str:
    """A folder with a random CLIPSeg."""
    folder = tmp_path_factory.mktemp("clipseg")
    tiny.clipseg().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def photo(left: str = "white", right: str = "black", size: tuple[int, int] = (60, 40)) -> Image.Image:
    image = Image.new("RGB", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def test_a_finder_sees_photo_and_word(clipseg: str) -> None:
    finder = Finder.load(clipseg)
    first = finder.likelihood(photo(), "dog")
    assert first.shape == (88, 88)
    assert 0 <= first.min() < 0.1 < 0.9 < first.max() <= 1
    np.testing.assert_array_equal(first, finder.likelihood(photo(), "dog"))
    for other in (finder.likelihood(photo(), "a striped cat"), finder.likelihood(photo("red"), "dog")):
        assert np.abs(first - other).max() > 0.1


def test_a_map_lies_on_the_photo_as_the_photo_does() -> None:
    """Without places, patches alike are likely alike: those of the left half, and those of the right one."""
    model = tiny.clipseg()
    with torch.no_grad():
        model.clip.vision_model.embeddings.position_embedding.weight.zero_()
    found = Finder(model, tiny.tokenizer()).likelihood(photo(), "dog")
    inner = found[8:-8, 8:-8].reshape(18, 4, 18, 4)  # a convolution sees beyond the edge
    assert np.abs(inner - inner[:1]).max() < 1e-4
    assert np.abs(inner[:, :, :7] - inner[:, :, :1]).max() < 1e-4
    assert np.abs(inner[:, :, 11:] - inner[:, :, -1:]).max() < 1e-4
    assert np.abs(inner[:, :, 0] - inner[:, :, -1]).max() > 0.1


def test_pixels_are_scaled_as_the_weights_were_trained() -> None:
    pixels = Finder(tiny.clipseg(), tiny.tokenizer())._pixels(Image.new("RGB", (30, 50), (255, 0, 51)))
    assert pixels.shape == (1, 3, 176, 176)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor(expected))


def test_what_is_no_clipseg_is_refused(tmp_path: Path) -> None:
    tiny.clip().save_pretrained(tmp_path / "clip")
    tiny.tokenizer().save_pretrained(tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    for name in ("/no/such/folder", str(tmp_path / "empty"), str(tmp_path / "clip")):
        with pytest.raises(ConfigurationError, match=r"model that finds subjects .* cannot be used.*CIDAS"):
            Finder.load(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos: one bare, one with a mask, one with a mask beside it, one cut out, one opaque with an alpha channel."""
    folder = tmp_path / "photos"
    (folder / "masks").mkdir(parents=True)
    for name, colour in (("bare", "red"), ("masked", "green"), ("beside", "blue")):
        photo(colour).save(folder / f"{name}.jpg")
    mask = photo().convert("L")
    mask.save(folder / "masks" / "masked.png")
    mask.save(folder / "beside_mask.png")
    for name, alpha in (("cut", mask), ("opaque", Image.new("L", mask.size, 255))):
        image = photo("yellow").convert("RGBA")
        image.putalpha(alpha)
        image.save(folder / f"{name}.png")
    (folder / "bare.txt").write_text("a <TOK>", encoding="utf-8")
    return folder


def quietly(*arguments: object, **settings: object) -> list[MadeMask]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_masks(*arguments, **settings)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_photos_without_a_mask_get_one_that_training_finds(folder: Path, clipseg: str) -> None:
    before = files(folder)
    made = quietly(folder, "dog", model=clipseg)
    written = {each.photo.name: each.mask for each in made}
    assert written == {"bare.jpg": folder / "masks" / "bare.png", "opaque.png": folder / "masks" / "opaque.png"}
    after = files(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"masks/bare.png", "masks/opaque.png"}
    read = {each.path.name: each for each in read_photos(folder, Concept.from_name("rex", "dog"))}
    assert all(each.mask is not None for each in read.values())
    for each in made:
        mask = read[each.photo.name].mask
        assert mask is not None
        assert np.asarray(mask).mean() / 255 == pytest.approx(each.share)
    assert quietly(folder, "dog", model="/no/such/model") == []


def test_a_mask_lies_as_its_photo_is_seen_and_in_the_folder_that_is_there(tmp_path: Path, clipseg: str) -> None:
    """Turned by its EXIF data, in one of kohya's folders, beside a folder of another spelling."""
    for place in ("5_rex dog", "Mask"):
        (tmp_path / place).mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    photo().save(tmp_path / "turned.jpg", exif=turned)
    photo("blue").save(tmp_path / "5_rex dog" / "more.photos.png")
    (first, second) = quietly(tmp_path, "dog", model=clipseg)
    assert first.mask == tmp_path / "5_rex dog" / "masks" / "more.photos.png"
    assert second.mask == tmp_path / "Mask" / "turned.png"
    assert Image.open(second.mask).size == (40, 60)
    assert all(each.mask for each in read_photos(tmp_path, Concept.from_name("rex", "dog")))


def test_with_leave_masks_of_the_same_name_are_made_anew(folder: Path, clipseg: str) -> None:
    before = files(folder)
    made = quietly(folder, "dog", model=clipseg, overwrite=True)
    assert [each.photo.name for each in made] == ["bare.jpg", "masked.jpg", "opaque.png"]
    after = files(folder)
    assert after["masks/masked.png"] != before["masks/masked.png"]
    assert after["beside_mask.png"] == before["beside_mask.png"]
    assert "masks/beside.png" not in after


def test_the_sheet_shows_every_photo_its_mask_and_the_cut_out(folder: Path, clipseg: str, tmp_path: Path) -> None:
    made = quietly(folder, "dog", model=clipseg, sheet=tmp_path / "look.png")
    sheet = np.asarray(Image.open(tmp_path / "look.png").convert("RGB")).astype(int)
    assert sheet.shape[0] >= len(made) * 40
    for colour in ((255, 0, 0), (255, 255, 0), (255, 0, 255)):
        assert (np.abs(sheet - colour).sum(axis=2) < 20).any()
    before = files(folder)
    (folder / "masks" / "bare.png").unlink()
    with pytest.raises(OverwriteError, match=r"look\.png is there already"):
        make_masks(folder, "dog", model="/no/such/model", sheet=tmp_path / "look.png")
    assert set(before) - set(files(folder)) == {"masks/bare.png"}


def test_unsure_photos_are_named_and_get_no_mask(tmp_path: Path, clipseg: str) -> None:
    """A model that likes everything alike finds nearly everything, or with a bias nothing at all."""
    photo().save(tmp_path / "1.png")
    (tmp_path / "masks").mkdir()
    for bias, told in ((50.0, "nearly everything"), (-50.0, "nothing of its kind")):
        model = tiny.clipseg()
        with torch.no_grad():
            model.decoder.transposed_convolution[-1].weight.zero_()
            model.decoder.transposed_convolution[-1].bias.fill_(bias)
        model.save_pretrained(tmp_path / told)
        tiny.tokenizer().save_pretrained(tmp_path / told)
        with pytest.warns(MixOfShowWarning, match=rf"(?s)1\.png got no mask: .*{told}.*by hand"):
            (made,) = make_masks(tmp_path, "dog", model=str(tmp_path / told))
        assert made == replace(made, mask=None)
        assert not list((tmp_path / "masks").iterdir())


def test_two_of_a_kind_give_a_mask_and_a_warning(
    tmp_path: Path, clipseg: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("1.png", "2.png"):
        photo(size=(SIDE, SIDE)).save(tmp_path / name)
    maps = iter([drawn(TALL), drawn(TALL, (25, 5, 35, 35))])
    monkeypatch.setattr(Finder, "likelihood", lambda *given: next(maps))
    with pytest.warns(
        MixOfShowWarning, match=r"(?s)^Masks of .*2\.png is unsure: more than one was found.*by hand"
    ) as told:
        made = make_masks(tmp_path, "dog", model=clipseg)
    assert "1.png" not in str(told[0].message)
    assert [bool(each.remark) for each in made] == [False, True]
    for each in made:
        assert each.mask is not None
        assert (np.asarray(Image.open(each.mask)) > 128).tolist() == box(*TALL).tolist()
        assert each.share == box(*TALL).mean()


def test_the_sheet_is_photo_mask_and_cut_out_in_small_with_what_was_found(
    tmp_path: Path, clipseg: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"sure": (400, 400), "two": (200, 400), "none": (80, 40)}
    for name, size in places.items():
        photo("red", "blue", size).save(tmp_path / f"{name}.png")
    maps = {"none": drawn(low=0.0), "sure": drawn(TALL), "two": drawn(TALL, (25, 5, 35, 35))}
    order = iter(maps.values())  # by name
    monkeypatch.setattr(Finder, "likelihood", lambda *given: next(order))
    quietly(tmp_path, "dog", model=clipseg, sheet=tmp_path / "look.png")
    rows = {}
    for name, label in (("none", "0%\nno mask"), ("sure", "22%"), ("two", "22%\nlook here")):
        image = Image.open(tmp_path / f"{name}.png").convert("RGB")
        mask = Image.new("L", image.size)
        if name != "none":
            mask = Image.open(tmp_path / "masks" / f"{name}.png")
        cut_out = Image.composite(image, Image.new("RGB", image.size, (255, 0, 255)), mask)
        rows[f"{name}.png\n{label}"] = row = [image, mask.convert("RGB"), cut_out]
        for each in row:
            each.thumbnail((160, 160))
    assert [row[0].size for row in rows.values()] == [(80, 40), (160, 160), (80, 160)]
    expected = draw_labelled_sheet(rows, title="photo, mask, cut-out")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "look.png")), np.asarray(expected))


def test_a_photo_that_is_transparent_everywhere_is_not_cut_out(tmp_path: Path, clipseg: str) -> None:
    clear = photo().convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    (made,) = quietly(tmp_path, "dog", model=clipseg)
    assert made.photo == tmp_path / "clear.png"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"class_word": " "}, "class_word is empty"),
        ({"threshold": 0.0}, "threshold is 0; expected"),
        ({"threshold": 1.0}, "threshold is 1; expected"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"folder": "nowhere"}, "is no folder"),
        ({"class_word": "", "threshold": 2}, "class_word is empty.*; threshold is 2"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(tmp_path: Path, arguments: dict, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        make_masks(**{"folder": tmp_path, "class_word": "dog", "model": "/no/such/model"} | arguments)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("broken.png", b"no picture", r"broken\.png is no readable picture"),
        ("masks/nobody.png", None, r"masks/nobody\.png belongs to no photo"),
        ("bare.png", None, "several photos are called 'bare'"),
    ],
)
def test_every_file_that_cannot_be_used_is_named(folder: Path, name: str, content: bytes | None, told: str) -> None:
    photo().save(folder / name)
    if content is not None:
        (folder / name).write_bytes(content)
    (folder / "other.png").write_bytes(b"")
    with pytest.raises(TrainingDataError, match=rf"(?s)cannot be used for masks.*{told}") as caught:
        make_masks(folder, "dog", model="/no/such/model")
    assert "other.png" in str(caught.value)


def test_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="has no photos"):
        make_masks(tmp_path, "dog", model="/no/such/model")


def test_without_a_hub_the_error_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket.socket, "connect", lambda *given: pytest.fail("the network was used"))
    with pytest.raises(ConfigurationError, match=r"CIDAS/clipseg.*cannot be used.*HF_HUB_OFFLINE") as caught:
        make_masks(folder, "dog")
    assert "\n" not in str(caught.value)
