"""Files appear whole or not at all, outlast a power cut, and take nothing's place unasked."""

from __future__ import annotations

import os
import time
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from diffusers_mixofshow import atomic
from diffusers_mixofshow.atomic import (
    check_outputs,
    find_existing,
    portable_name,
    refuse_overwriting,
    write_picture,
    write_probe,
    write_whole,
)
from diffusers_mixofshow.errors import ConfigurationError, FileWriteError, OverwriteError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_content_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, object]] = []
    flush, replace = os.fsync, os.replace

    def flushing(descriptor: int) -> None:
        status = os.fstat(descriptor)
        done.append(("flush", (status.st_ino, status.st_size)))
        flush(descriptor)

    def replacing(source: Path, target: Path) -> None:
        done.append(("replace", (Path(source).parent, target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "replace", replacing)
    path = tmp_path / "deep" / "down" / "x.bin"
    write_whole(path, b"12345")
    assert path.read_bytes() == b"12345"
    folder = path.parent.stat()
    assert done == [
        ("flush", (path.stat().st_ino, 5)),
        ("replace", (path.parent, path)),
        ("flush", (folder.st_ino, folder.st_size)),
    ]
    assert names(path.parent) == ["x.bin"]


def test_what_cannot_be_written_is_told_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.bin").write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileWriteError, match=r"x\.bin cannot be written: No space left on device\. What stood there"):
        write_whole(tmp_path / "x.bin", b"new")
    assert (names(tmp_path), (tmp_path / "x.bin").read_bytes()) == (["x.bin"], b"old")


def test_a_link_is_replaced_and_a_folder_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", b"ours")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"theirs"
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(FileWriteError, match="folder cannot be written"):
        write_whole(tmp_path / "folder", b"ours")
    assert names(tmp_path) == ["folder", "link", "target"]


@pytest.mark.parametrize("name", ["x.bin", "x[1]*?.bin"])
def test_what_killed_writers_of_the_same_file_left_is_swept_after_an_hour(tmp_path: Path, name: str) -> None:
    now = time.time()
    ages = {f".{name}.aa.tmp": 3700, f".{name}.bb.tmp": 3500, ".other.bin.cc.tmp": 9999, f"{name}.tmp": 9999}
    for left, age in ages.items():
        (tmp_path / left).write_bytes(b"part")
        os.utime(tmp_path / left, (now - age, now - age))
    write_whole(tmp_path / name, b"whole")
    assert names(tmp_path) == sorted([name, *(left for left in ages if left != f".{name}.aa.tmp")])


COMPOSED, APART = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("files", "collide"),
    [
        (("a", "b"), False),
        (("a/x", "b/x"), False),
        (("a", "ab"), False),
        (("a", "a"), True),
        (("a", "A"), True),
        ((COMPOSED, APART), True),
        (("b", "a", "./a"), True),
        (("a", "a/x"), True),
        (("a/x", "c", "a"), True),
        (("a/x/y", "a"), True),
    ],
)
def test_two_outputs_that_are_one_place_are_refused(tmp_path: Path, files: tuple[str, ...], collide: bool) -> None:
    paths = [tmp_path / file for file in files]
    if collide:
        with pytest.raises(ConfigurationError, match="are to be written, but one is where the other would be"):
            check_outputs(*paths, overwrite=True)
    else:
        check_outputs(*paths, overwrite=False)
    assert names(tmp_path) == []


def test_outputs_are_looked_at_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").write_text("x")
    (tmp_path / "folder").mkdir()
    new = tmp_path / "deep" / "new"
    check_outputs(new, overwrite=False)
    assert names(tmp_path) == ["folder", "there"]
    with pytest.raises(OverwriteError, match="there is there already"):
        check_outputs(new, tmp_path / "there", overwrite=False)
    check_outputs(new, tmp_path / "there", overwrite=True)
    with pytest.raises(FileWriteError, match=r"there are folders: .*folder\. Choose other names"):
        check_outputs(new, tmp_path / "folder", overwrite=True)
    with pytest.raises(FileWriteError, match=r"under cannot be written: Not a directory\. Choose a folder that you"):
        check_outputs(new, tmp_path / "there" / "under", overwrite=True)
    looked: list[Path] = []
    monkeypatch.setattr(atomic, "write_probe", looked.append)
    monkeypatch.chdir(tmp_path)
    check_outputs(Path("one"), Path("deep/two"), overwrite=False)
    assert looked == [tmp_path, tmp_path / "deep"]


def test_a_probe_is_written_into_the_nearest_folder_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    temporary = atomic.tempfile.TemporaryFile

    def noting(dir: Path) -> object:
        asked.append(dir)
        return temporary(dir=dir)

    monkeypatch.setattr(atomic.tempfile, "TemporaryFile", noting)
    for folder in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        write_probe(folder)
    monkeypatch.chdir(tmp_path)
    write_probe(Path("c/d"))
    assert [path.resolve() for path in asked] == [tmp_path] * 4
    assert names(tmp_path) == []


def test_what_stands_somewhere_is_whatever_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    places = [tmp_path / name for name in ("file", "gone", "folder", "link")]
    assert find_existing(*places) == [places[0], places[2], places[3]]


@pytest.mark.parametrize("way", ["gone/..", "gone/deeper/../..", "folder/gone/../..", "linked/gone/../..", "."])
def test_what_stands_somewhere_is_found_on_ways_that_writing_makes(tmp_path: Path, way: str) -> None:
    """A folder that is missing is made by whoever writes, and ``..`` then leads out of it again."""
    start = tmp_path / "start"
    (start / "folder").mkdir(parents=True)
    (start / "linked").symlink_to("folder")
    (start / "file").write_text("mine")
    (start / "link").symlink_to("nowhere")
    for name in ("file", "link", "folder"):
        assert find_existing(start / way / name) == [start / way / name]
    assert find_existing(start / way / "other") == []
    with pytest.raises(OverwriteError):
        check_outputs(start / way / "file", overwrite=False)
    with pytest.raises(FileWriteError, match="folders"):
        check_outputs(start / way / "folder", overwrite=True)


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (1, "0 is there already, and nothing is overwritten unasked. {}, or give overwrite=True, which replaces it."),
        (2, "0, 1 are there already, and nothing is overwritten unasked. {}, or give overwrite=True, which replaces"),
        (4, "0, 1, 2, 3 are there already, and nothing is overwritten unasked. {}, or give overwrite=True, which"),
        (6, "0, 1, 2, 3 and 2 more are there already, and nothing is overwritten unasked. {}, or give overwrite=True"),
    ],
)  # fmt: skip
def test_what_would_be_overwritten_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    places = [Path(str(number)) for number in range(count)]
    refuse_overwriting(*places, overwrite=False)
    for place in places:
        place.write_text("x")
    refuse_overwriting(*places, overwrite=True)
    for otherwise, words in (({}, "Choose another place"), ({"otherwise": "Do this"}, "Do this")):
        with pytest.raises(OverwriteError) as caught:
            refuse_overwriting(*places, Path("gone"), overwrite=False, **otherwise)
        assert str(caught.value).startswith(told.format(words))


def test_pictures_are_written_in_their_format_with_what_it_takes(tmp_path: Path) -> None:
    picture = Image.linear_gradient("L").convert("RGB")
    write_picture(tmp_path / "x", picture)
    write_picture(tmp_path / "fine.jpg", picture, "JPEG", quality=95)
    write_picture(tmp_path / "coarse.jpg", picture, "JPEG", quality=5)
    with Image.open(tmp_path / "x") as read:
        assert (read.format, read.tobytes()) == ("PNG", picture.tobytes())
    assert (tmp_path / "fine.jpg").stat().st_size > 2 * (tmp_path / "coarse.jpg").stat().st_size


@pytest.mark.parametrize(
    ("name", "spelt"),
    [
        ("con", "con_"),
        ("CON.safetensors", "CON_.safetensors"),
        ("nul.tar.gz", "nul_.tar.gz"),
        ("Com1", "Com1_"),
        ("lpt\N{SUPERSCRIPT TWO}.png", "lpt\N{SUPERSCRIPT TWO}_.png"),
        ("con .png", "con _.png"),
        ("conin$", "conin$_"),
        ("rex.", "rex_"),
        ("rex. .", "rex___"),
        ('a<b>:"/\\|?*c\x07', "a_b________c_"),
        ("", ""),
        *((name, name) for name in ("rex", "concert", "com", "com10", "my.con", "con-2", "auxiliary.png", ".hidden")),
    ],
)
def test_a_portable_name_is_taken_by_every_system(name: str, spelt: str) -> None:
    """As Windows documents what it reserves; a portable name stays, so that spelling it twice is of no effect."""
    assert portable_name(name) == spelt
    assert portable_name(spelt) == spelt
