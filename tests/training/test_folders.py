"""Folders as systems, editors and other programs leave them: every file is used, or named in the one warning."""

from __future__ import annotations

import json
import os
import unicodedata
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.errors import MixOfShowWarning, TrainingDataError
from diffusers_mixofshow.training import hub_data, prior
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.data import read_photos
from diffusers_mixofshow.training.pictures import Photo


REX = Concept.from_name("rex", "dog")
BEACH = "a <TOK> on the beach"
SAID = ("a <rex> on the beach",)


def photo(path: Path, seed: int = 0) -> None:
    """A picture like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(draws).resize((64, 48)).save(path, "PNG")


def mask(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (64, 48), 255).save(path, "PNG")


def write(path: Path, text: str = BEACH, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding, newline="")


def read(folder: Path, **settings: object) -> tuple[list[Photo], str]:
    """The photos, and the one warning."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MixOfShowWarning)
        photos = read_photos(folder, REX, **settings)  # type: ignore[arg-type]
    assert len(told) <= 1
    return photos, str(told[0].message) if told else ""


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("1.txt", write),
        ("1.TXT", write),
        ("1.Txt", write),
        ("1.caption", write),
        ("1.jpg.txt", write),
        ("1.json", lambda path: write(path, json.dumps({"caption": BEACH, "width": 64}))),
        ("1.JSON", lambda path: write(path, json.dumps({"text": [BEACH]}))),
        ("1.jpg.json", lambda path: write(path, json.dumps({"text": BEACH}))),
        ("metadata.csv", lambda path: write(path, f'file_name,text\n1.jpg,"{BEACH}"\n')),
        ("Metadata.CSV", lambda path: write(path, f'file_name, text\n1.jpg, "{BEACH}"\n')),
        ("metadata.csv", lambda path: write(path, f"file_name;text\n1.jpg;{BEACH}\n")),
        ("metadata.csv", lambda path: write(path, f"file_name\ttext\r\n1.jpg\t{BEACH}\r\n")),
        ("metadata.csv", lambda path: write(path, f'"file_name";"text"\r1.jpg;"{BEACH}"\r')),
        ("metadata.csv", lambda path: write(path, f"file_name,text,,\n1.jpg,{BEACH},,\n,,,\n")),
        ("metadata.csv", lambda path: write(path, f"file_name,text,mask_file_name\n1.jpg,{BEACH}\n")),
        ("metadata.csv", lambda path: write(path, f"file_name,text\n1.jpg,{BEACH}\n", encoding="utf-8-sig")),
        ("METADATA.jsonl", lambda path: write(path, json.dumps({"file_name": "1.jpg", "text": BEACH}))),
        ("metadata.jsonl", lambda path: write(path, json.dumps({"file_name": "./1.JPG", "text": BEACH}) + "\r\r\n")),
        ("metadata.jsonl", lambda path: write(path, json.dumps({"file_name": " 1.jpg", "text": BEACH}), "utf-16")),
    ],
)
def test_captions_however_they_are_spelt(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    photo(tmp_path / "1.jpg")
    make(tmp_path / name)
    photos, told = read(tmp_path)
    assert (photos[0].captions, told) == (SAID, "")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x1c", "\x0b"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "1.txt", "1.json"])
def test_separators_that_end_no_line(tmp_path: Path, name: str, separator: str) -> None:
    photo(tmp_path / "1.jpg")
    caption = f"a <TOK>{separator} at night"
    texts = {
        "metadata.jsonl": json.dumps({"file_name": "1.jpg", "text": caption}, ensure_ascii=False),
        "metadata.csv": f"file_name,text\n1.jpg,{caption}\n",
        "1.txt": caption,
        "1.json": json.dumps({"text": caption}, ensure_ascii=False),
    }
    write(tmp_path / name, texts[name])
    assert read(tmp_path)[0][0].captions == (f"a <rex>{separator} at night",)


@pytest.mark.parametrize(
    "name",
    [
        *("masks/1.png", "Masks/1.PNG", "mask/1.png", "MASK/1.tif", "masks/1.jpg.png"),
        *("1_mask.png", "1-mask.png", "1.mask.png", "1-masklabel.png", "1_MASK.PNG"),
    ],
)
def test_masks_wherever_they_lie(tmp_path: Path, name: str) -> None:
    photo(tmp_path / "1.jpg")
    mask(tmp_path / name)
    photos, told = read(tmp_path)
    assert [found.path.name for found in photos] == ["1.jpg"]
    assert photos[0].mask is not None
    assert told == ""


def test_a_photo_called_mask_is_a_photo(tmp_path: Path) -> None:
    photo(tmp_path / "carnival_mask.jpg")
    photo(tmp_path / "2.jpg", 1)
    photos, told = read(tmp_path)
    assert ([found.path.name for found in photos], told) == (["2.jpg", "carnival_mask.jpg"], "")


COMPOSED, APART = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("on_disk", "written"), [(COMPOSED, APART), (APART, COMPOSED), ("CAFÉ", "café")])
def test_names_in_whatever_form(tmp_path: Path, on_disk: str, written: str) -> None:
    photo(tmp_path / "deep" / f"{on_disk}.jpg", 1)
    photo(tmp_path / f"{on_disk}.jpg")
    mask(tmp_path / "masks" / f"{written}.png")
    mask(tmp_path / "deep" / f"{written}-x.png")
    row = {"file_name": f"deep/{written}.jpg", "text": BEACH, "mask_file_name": f"deep\\{written}-x.png"}
    write(tmp_path / "metadata.jsonl", json.dumps(row))
    write(tmp_path / f"{written}.txt")
    photos, told = read(tmp_path)
    assert [(found.captions, found.mask is None) for found in photos] == [(SAID, False), (SAID, False)]
    assert told == ""


def test_two_photos_that_differ_in_case_keep_their_own(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "A")):
        photo(tmp_path / f"{name}.jpg", number)
        write(tmp_path / f"{name}.txt", f"{name} <TOK>")
    assert [found.captions for found in read(tmp_path)[0]] == [("A <rex>",), ("a <rex>",)]


def test_what_systems_leave_is_no_data(tmp_path: Path) -> None:
    photo(tmp_path / "1.jpg")
    for name in (
        *("._1.jpg", ".DS_Store", "Thumbs.db", "thumbs.DB", "desktop.ini", "Icon\r", "._1.txt", ".hidden.png"),
        *("__MACOSX/._1.jpg", "__MACOSX/1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", "@eaDir/1.jpg/x.jpg"),
        *(".cache/huggingface/download/1.jpg.metadata", ".git/config", "masks/.DS_Store", "masks/Thumbs.db"),
        *("1.jpg:Zone.Identifier", "masks/1.png:Zone.Identifier"),
        *("README.md", "readme.txt", "LICENSE", "LICENSE.txt"),
    ):
        write(tmp_path / name, "no picture")
    photos, told = read(tmp_path)
    assert ([found.path.name for found in photos], told) == (["1.jpg"], "")


def test_what_is_of_no_use_is_one_line_each(tmp_path: Path) -> None:
    photo(tmp_path / "1.jpg")
    for name in ("notes.txt", "film.mp4", "1.xmp", "2.xmp", "3.xmp", "4.xmp", "1.npz", "dataset.toml", "set.json"):
        write(tmp_path / name, "whatever")
    for name in ("rejected/a.jpg", "rejected/b.jpg", "rejected/deep/c.jpg", "rejected/deep/d.txt", "masks/list.txt"):
        write(tmp_path / name, "whatever")
    (tmp_path / "link").symlink_to(tmp_path / "rejected")
    write(tmp_path / "1.json", "[]")
    photos, told = read(tmp_path)
    left, several = "is of no known use and was left alone", "are of no known use and were left alone"
    assert told == "\n".join(
        [
            f"Photos in {tmp_path}:",
            "  notes.txt belongs to no photo;",
            "  1.json has no caption and was left alone;",
            f"  link {left};",
            f"  set.json {left};",
            f"  film.mp4 {left};",
            f"  1.npz {left};",
            f"  dataset.toml {left};",
            f"  1.xmp, 2.xmp, 3.xmp and 1 more {several};",
            f"  masks/list.txt {left};",
            "  rejected/a.jpg, rejected/b.jpg, rejected/deep/c.jpg and 1 more are in a subfolder that is not read; "
            "name the photos in metadata, or move them up.",
        ]
    )
    assert len(photos) == 1


def test_a_text_that_names_the_concept_is_a_caption_of_no_photo(tmp_path: Path) -> None:
    photo(tmp_path / "1.jpg")
    write(tmp_path / "lost.txt", "<rex2> in the snow")
    write(tmp_path / "masks" / "notes.txt", "whatever")
    mask(tmp_path / "masks" / "gone.png")
    with pytest.raises(TrainingDataError) as caught:
        read_photos(tmp_path, REX)
    for words in (
        "lost.txt belongs to no photo",
        "masks/gone.png belongs to no photo",
        "masks/notes.txt is of no known",
    ):
        assert words in str(caught.value)


def test_folders_of_kohyas_scripts(tmp_path: Path) -> None:
    photo(tmp_path / "0.jpg")
    for number, name in enumerate(("10_rex dog/1.jpg", "1_other/1.jpg", "3_/1.jpg", "x_10/1.jpg")):
        photo(tmp_path / name, number + 1)
    write(tmp_path / "10_rex dog" / "1.TXT")
    mask(tmp_path / "10_rex dog" / "masks" / "1.png")
    photos, told = read(tmp_path)
    assert [found.path.relative_to(tmp_path).as_posix() for found in photos] == [
        *("0.jpg", "10_rex dog/1.jpg", "1_other/1.jpg")
    ]
    assert (photos[1].captions, photos[1].mask is None) == (SAID, False)
    assert "10_rex dog/ is read as kohya's scripts do, but each photo counts once, not 10 times" in told
    assert "1_other" not in told
    assert "3_/1.jpg is in a subfolder that is not read" in told
    assert "x_10/1.jpg is in a subfolder that is not read" in told
    (tmp_path / "0.jpg").unlink()
    assert len(read(tmp_path)[0]) == 2


@pytest.mark.parametrize("train", ["train", "Train"])
def test_what_lies_beside_train_is_told(tmp_path: Path, train: str) -> None:
    photo(tmp_path / train / "1.jpg")
    photo(tmp_path / "test" / "2.jpg")
    write(tmp_path / "README.md")
    write(tmp_path / ".gitattributes")
    photos, told = read(tmp_path)
    assert len(photos) == 1
    assert told.endswith("test lies beside the photos' folder and was left alone.")


def test_a_folder_that_holds_photos_only_further_down_names_them(tmp_path: Path) -> None:
    photo(tmp_path / "rex" / "1.jpg")
    with pytest.raises(TrainingDataError, match=r"has no photos.*rex/1\.jpg is in a subfolder"):
        read_photos(tmp_path, REX)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "file_name,text\n1.jpg,a <TOK>, at night, <TOK>\n",
            "line 2 has 4 cells, the first line 2; put captions with ','",
        ),
        ("file_name,text\n1.jpg,a <TOK>\n1.jpg,a, <TOK>", "line 3 has 3 cells, the first line 2"),
        ("file_name;text\n1.jpg;a <TOK>; at night\n", "line 2 has 3 cells, the first line 2; put captions with ';'"),
        ("file_name,text\n1.jpg\n", "line 2: there is no 'text'"),
        ("file_name,text\n1.jpg,\n", "line 2: there is no 'text'"),
        ("file_name,text,text\n1.jpg,<TOK>,b\n", "line 1: there are several columns 'text'"),
        ("image,text\n1.jpg,<TOK>\n", r"line 2: there is no 'file_name' \(there is image, text\)"),
        ('file_name,text\n1.jpg,"a <TOK>\n', "no CSV"),
    ],
)
def test_cells_that_do_not_fit(tmp_path: Path, text: str, words: str) -> None:
    photo(tmp_path / "1.jpg")
    write(tmp_path / "metadata.csv", text)
    with pytest.raises(TrainingDataError, match=f"metadata.csv, {words}"):
        read_photos(tmp_path, REX)


def test_a_list_in_place_of_lines_and_many_wrong_lines_are_no_wall(tmp_path: Path) -> None:
    photo(tmp_path / "1.jpg")
    write(tmp_path / "metadata.jsonl", json.dumps([{"file_name": "1.jpg", "text": BEACH}] * 50, indent=1))
    with pytest.raises(TrainingDataError, match="expected one object a line") as caught:
        read_photos(tmp_path, REX)
    assert str(caught.value).count("metadata.jsonl, ") == 1
    write(tmp_path / "metadata.jsonl", "\n".join(f'{{"file_name": "{number}.jpg"}}' for number in range(50)))
    with pytest.raises(TrainingDataError, match=r"metadata\.jsonl, and 30 more") as caught:
        read_photos(tmp_path, REX)
    assert str(caught.value).count("metadata.jsonl, ") == 21


@pytest.mark.parametrize("name", ["1.txt", "metadata.csv", "metadata.jsonl", "1.json"])
@pytest.mark.parametrize("content", ["\x93a <TOK>\x94 caf\xe9".encode("latin-1"), BEACH.encode("utf-16-le")])
def test_other_encodings_are_told(tmp_path: Path, name: str, content: bytes) -> None:
    photo(tmp_path / "1.jpg")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingDataError, match=f"{name} is no UTF-8 text .*; save it as UTF-8"):
        read_photos(tmp_path, REX)


def test_captions_in_two_places(tmp_path: Path) -> None:
    photo(tmp_path / "1.jpg")
    write(tmp_path / "1.txt")
    write(tmp_path / "1.json", json.dumps({"caption": BEACH}))
    assert read(tmp_path)[0][0].captions == SAID
    write(tmp_path / "1.json", json.dumps({"caption": "another <TOK>"}))
    with pytest.raises(TrainingDataError, match=r"1\.jpg has captions in 1\.txt and in 1\.json; keep one"):
        read_photos(tmp_path, REX)
    write(tmp_path / "1.json", json.dumps({"caption": 5}))
    with pytest.raises(TrainingDataError, match=r"training: 1\.json: 'caption' is 5, expected a text"):
        read_photos(tmp_path, REX)
    (tmp_path / "1.json").unlink()
    write(tmp_path / "1.caption", "another <TOK>")
    with pytest.raises(TrainingDataError, match=r"1\.caption and in 1\.txt"):
        read_photos(tmp_path, REX)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "1.jpg", "text": "<TOK>", "text": "b"}', "line 1: no JSON \\('text' more than once\\)"),
        ('{"file_name": "1.jpg", "text": "a <TOK> \\ud83d"}', r"metadata\.jsonl, 1\.jpg: .* has half of a character"),
    ],
)
def test_captions_that_are_there_twice_or_in_half(tmp_path: Path, line: str, words: str) -> None:
    photo(tmp_path / "1.jpg")
    write(tmp_path / "metadata.jsonl", line)
    with pytest.raises(TrainingDataError, match=words):
        read_photos(tmp_path, REX)


@pytest.mark.parametrize(
    "text", ['{"caption": ""}', '{"caption": null}', "no JSON", '{"tags": "a, b"}', '["a"]', "[" * 9999]
)
def test_json_without_a_caption_is_told(tmp_path: Path, text: str) -> None:
    photo(tmp_path / "1.jpg")
    write(tmp_path / "1.json", text)
    photos, told = read(tmp_path)
    assert "a photo of a <rex>" in photos[0].captions
    assert told.endswith("1.json has no caption and was left alone.")


def test_captions_in_json_are_ignored_as_metadata_are(tmp_path: Path) -> None:
    photo(tmp_path / "1.jpg")
    write(tmp_path / "1.json", json.dumps({"prompt": BEACH, "caption": "another <TOK>"}))
    assert read(tmp_path, caption_column="prompt")[0][0].captions == SAID
    assert read(tmp_path, caption_column=None, templates=["my <TOK>"])[0][0].captions == ("my <rex>",)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.symlink_to("nowhere"), r"2\.jpg is a link to nothing, or no plain file"),
        (os.mkfifo, r"2\.jpg is a link to nothing, or no plain file"),
        (lambda path: path.write_bytes(b""), r"2\.jpg is no readable picture \(the file is empty\)"),
        (lambda path: path.with_suffix(".txt").write_bytes(b""), r"2\.txt"),
        (lambda path: (path.parent / "1.txt").symlink_to("nowhere"), r"1\.txt cannot be read \(No such file"),
        (lambda path: (path.parent / "metadata.csv").symlink_to("nowhere"), r"metadata\.csv cannot be read"),
        (lambda path: write(path.parent / "1.txt", "\n \n"), r"1\.txt is empty"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    photo(tmp_path / "1.jpg")
    make(tmp_path / "2.jpg")
    if words == r"2\.txt":
        assert "2.txt belongs to no photo" in read(tmp_path)[1]
        return
    with pytest.raises(TrainingDataError, match=words):
        read_photos(tmp_path, REX)


def test_a_folder_with_a_pictures_name_is_a_folder(tmp_path: Path) -> None:
    photo(tmp_path / "1.jpg")
    photo(tmp_path / "album.jpg" / "2.jpg", 1)
    photos, told = read(tmp_path)
    assert len(photos) == 1
    assert "album.jpg/2.jpg is in a subfolder" in told


def test_pictures_of_the_class_are_read_likewise(tmp_path: Path) -> None:
    for number, name in enumerate(("1_dog/1.jpg", "1_dog/2.PNG", "class.jpg")):
        photo(tmp_path / name, number)
    write(tmp_path / "._class.jpg", "no picture")
    write(tmp_path / "film.mp4", "no picture")
    config = TrainingConfig(
        instance_data_dir="photos", concept="rex", class_word="dog", class_data_dir=str(tmp_path), num_class_images=2
    )
    with pytest.warns(MixOfShowWarning) as told:
        photos = prior.read_class_pictures(None, config, drawing=False)
    assert [found.path.name for found in photos] == ["1.jpg", "2.PNG"]
    (warning,) = told
    assert "film.mp4 is of no known use" in str(warning.message)
    assert "class.jpg is beyond num_class_images and not used" in str(warning.message)
    write(tmp_path / "1_dog" / "1.jpg", "no picture")
    with pytest.raises(TrainingDataError, match=r"1_dog/1\.jpg is no readable picture"):
        prior.read_class_pictures(None, config, drawing=False)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        *[(name, True) for name in ("a.jpg", "a.JPG", "deep/a.Jpeg", "masks/a.png", "a.TXT", "a.caption", "a.json")],
        *[(name, True) for name in ("metadata.jsonl", "train/metadata.csv", "Metadata.CSV")],
        *[(name, False) for name in ("run.py", "a.zip", "data.parquet", "weights.safetensors", "a.bin", "other.csv")],
    ],
)
def test_what_is_fetched_of_a_data_set(name: str, wanted: bool) -> None:
    assert any(fnmatchcase(name, pattern) for pattern in hub_data._WANTED) is wanted
