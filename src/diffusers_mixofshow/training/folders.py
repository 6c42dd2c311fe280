"""What lies in a folder of photos: every file has a part, or is named in a remark."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers_mixofshow.errors import ConfigurationError, TrainingDataError
from diffusers_mixofshow.pictures import PICTURE_SUFFIXES, is_picture
from diffusers_mixofshow.training.captions import METADATA_FILES, Metadata, read_metadata


MASK_FOLDERS = ("masks", "mask")
"""Names of the folder beside the photos that holds their masks, in any case of letters."""

MASK_ENDINGS = ("-masklabel", "_mask", "-mask", ".mask")
"""What stands behind a photo's name in that of a mask beside it."""

CAPTION_SUFFIXES = (".txt", ".caption")
"""Endings of the files beside a photo that hold its captions, one a line."""

_TRAIN = "train"
_REPEATED = re.compile(r"(\d+)_.+")
"""Folders of photos as kohya's scripts name them: how often each is used, and what it shows."""
_SYSTEMS = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin")
_BESIDE_DOWNLOADS = ":zone.identifier"
"""What systems put into folders, and beside downloads; names that begin with a dot are hidden, too."""
_ABOUT_DATA = re.compile(r"(readme|license|licence|copying)(\..*)?", re.IGNORECASE)
"""Texts about the data set, which are not reported as files without a use."""
_ELSEWHERE = "in a subfolder that is not read; name the photos in metadata, or move them up"
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of a folder by their parts.

    Args:
        folder: Where names start.
        photos: In the order of their names.
        captions: Photo to its files of captions.
        descriptions: Photo to its JSON files.
        masks: Photo to its masks.
        strays: Texts that belong to no photo.
        metadata: What the folder's metadata say, photos and masks named as they are on the disk.
        defects: What cannot be used.
        remarks: What was left alone.
    """

    folder: Path
    photos: Sequence[Path]
    captions: Mapping[Path, Sequence[Path]]
    descriptions: Mapping[Path, Sequence[Path]]
    masks: Mapping[Path, Sequence[Path]]
    strays: Sequence[Path]
    metadata: Metadata
    defects: Sequence[str]
    remarks: Sequence[str]

    def name(self, path: Path) -> str:
        """The path as seen from the folder."""
        return path.relative_to(self.folder).as_posix()


def list_folder(folder: Path, *, column: str | None = None) -> Listing:
    """Find the part of every file in a folder of photos.

    Photos lie in the folder itself, in folders that kohya's scripts would use (``10_name``), or where metadata say. A
    folder without photos but with a folder ``train`` stands for that. Names are compared in one Unicode form, and
    whatever the case of their letters where only one fits.

    Args:
        folder: The folder.
        column: Where metadata have their captions; None ignores these.

    Raises:
        ConfigurationError: If there is no such folder.
        TrainingDataError: If it cannot be read.
    """
    folder, remarks = _folder_of_photos(folder)
    files, defects = _visible_files(folder)
    metadata = _on_disk(read_metadata(folder, column=column), folder, files)
    photos, masks = _pictures(folder, files, metadata)
    sorted_out = _Parts(folder, photos, masks)
    for file in files:
        sorted_out.add(file)
    return Listing(
        folder=folder,
        photos=photos,
        captions=sorted_out.captions,
        descriptions=sorted_out.descriptions,
        masks=sorted_out.masks,
        strays=sorted_out.strays,
        metadata=metadata,
        defects=[*metadata.defects, *defects, *_twins(folder, photos), *sorted_out.defects],
        remarks=[*remarks, *_repeats(folder, photos), *sorted_out.remarks()],
    )


def few(names: Sequence[str], one: str, several: str) -> list[str]:
    """One sentence about some files, the first of them named; none about none.

    Args:
        names: The files.
        one: How the sentence goes on after one name.
        several: After several.
    """
    if not names:
        return []
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [f"{', '.join(names[:_NAMED])}{more} {one if len(names) == 1 else several}"]


def one_a_line(about: str, remarks: Sequence[str]) -> str:
    """A warning of several sentences, each in its own line."""
    if len(remarks) == 1:
        return f"{about}: {remarks[0]}."
    return f"{about}:\n" + ";\n".join(f"  {remark}" for remark in remarks) + "."


class _Names:
    """Paths by their names in whatever Unicode form, and in whatever case of letters where only one fits."""

    def __init__(self, named: Iterable[tuple[str, Path]]) -> None:
        self._exact: dict[str, set[Path]] = defaultdict(set)
        self._folded: dict[str, set[Path]] = defaultdict(set)
        for name, path in named:
            self._exact[_normalise_accents(name)].add(path)
            self._folded[_normalise_accents(name).casefold()].add(path)

    def find(self, name: str) -> Path | None:
        """The one path of that name."""
        name = _normalise_accents(name)
        for found in (self._exact.get(name, set()), self._folded.get(name.casefold(), set())):
            if len(found) == 1:
                return next(iter(found))
        return None


class _Parts:
    """Gives each file that is no photo its part."""

    def __init__(self, folder: Path, photos: Sequence[Path], masks: Mapping[Path, Sequence[Path]]) -> None:
        self.folder, self._photos = folder, frozenset(photos)
        self.masks = {photo: list(files) for photo, files in masks.items()}
        self._taken = {file for files in masks.values() for file in files} | self._photos
        self._places = {photo.parent for photo in photos} | {folder}
        self._owners = _owners(photos)
        self.captions: dict[Path, list[Path]] = defaultdict(list)
        self.descriptions: dict[Path, list[Path]] = defaultdict(list)
        self.strays: list[Path] = []
        self.defects: list[str] = []
        self._useless: dict[str, list[Path]] = defaultdict(list)

    def add(self, file: Path) -> None:
        """Sort in one file."""
        suffix, name = file.suffix.lower(), file.relative_to(self.folder).as_posix()
        if file in self._taken or (file.parent == self.folder and file.name.lower() in METADATA_FILES):
            return
        if is_picture(file) and _is_mask_folder(file.parent) and file.parent.parent in self._places:
            photo = self._owner(file, file.parent.parent)
            if photo is None:
                self.defects.append(f"{name} belongs to no photo")
            else:
                self.masks.setdefault(photo, []).append(file)
        elif (photo := self._owner(file, file.parent)) is not None and suffix in CAPTION_SUFFIXES:
            self.captions[photo].append(file)
        elif photo is not None and suffix == ".json":
            self.descriptions[photo].append(file)
        elif suffix in CAPTION_SUFFIXES and file.parent in self._places and not _ABOUT_DATA.fullmatch(file.name):
            self.strays.append(file)
        elif file.parent != self.folder or not _ABOUT_DATA.fullmatch(file.name):
            first = file.relative_to(self.folder).parts[0]
            self._useless[suffix if file.parent == self.folder else f"{first}/"].append(file)

    def remarks(self) -> list[str]:
        """One sentence for each ending, and for each folder in the folder, about its files that have no part."""
        told = []
        for _, files in sorted(self._useless.items()):
            names = [file.relative_to(self.folder).as_posix() for file in files]
            if all(file.parent in self._places or _is_mask_folder(file.parent) for file in files):
                told += few(names, "is of no known use and was left alone", "are of no known use and were left alone")
            else:
                told += few(names, f"is {_ELSEWHERE}", f"are {_ELSEWHERE}")
        return told

    def _owner(self, file: Path, place: Path) -> Path | None:
        """The photo that a file belongs to: ``1.txt`` or ``1.jpg.txt`` to ``1.jpg``."""
        return self._owners.find((place / file.stem).as_posix())


def _owners(photos: Iterable[Path]) -> _Names:
    return _Names((name.as_posix(), photo) for photo in photos for name in (photo, photo.with_suffix("")))


def _normalise_accents(name: str) -> str:
    """The name in the form that editors write; a Mac's file system takes letters and accents apart."""
    return unicodedata.normalize("NFC", name)


def _folder_of_photos(folder: Path) -> tuple[Path, list[str]]:
    """The folder or its ``train``, and what lies beside that."""
    if not folder.is_dir():
        raise ConfigurationError(
            f"{folder} is no folder. Expected a folder of photos ({', '.join(PICTURE_SUFFIXES)}); a data set of "
            "the Hub is named by dataset_name."
        )
    try:
        entries = sorted(path for path in folder.iterdir() if not _is_hidden(path.name))
    except OSError as error:
        raise TrainingDataError(f"{folder} cannot be read ({error}). Check who may read it.") from error
    train = next((path for path in entries if path.name.lower() == _TRAIN and path.is_dir()), None)
    if train is None or any(is_picture(path) or path.name.lower() in METADATA_FILES for path in entries):
        return folder, []
    beside = [path.name for path in entries if path != train and not _ABOUT_DATA.fullmatch(path.name)]
    return train, few(beside, "lies beside the photos' folder and was left alone", "were left alone beside it")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEMS or name.lower().endswith(_BESIDE_DOWNLOADS)


def _is_mask_folder(folder: Path) -> bool:
    return folder.name.lower() in MASK_FOLDERS


def _visible_files(folder: Path) -> tuple[list[Path], list[str]]:
    """All files that are not hidden, at any depth, links to folders among them; and what cannot be read."""
    files: list[Path] = []
    defects: list[str] = []

    def refused(error: OSError) -> None:
        defects.append(f"{Path(error.filename).relative_to(folder).as_posix()} cannot be read ({error.strerror})")

    for place, folders, names in os.walk(folder, onerror=refused):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        links = [name for name in folders if Path(place, name).is_symlink()]
        files += [Path(place, name) for name in (*names, *links) if not _is_hidden(name)]
    return sorted(files), defects


def _on_disk(metadata: Metadata, folder: Path, files: Sequence[Path]) -> Metadata:
    """Metadata with the names that the files have; a name that no file has stays as it is."""
    known = _Names((file.relative_to(folder).as_posix(), file) for file in files)

    def spelt(name: str) -> str:
        found = known.find(name) or known.find(name.replace("\\", "/"))
        return name if found is None else found.relative_to(folder).as_posix()

    captions: dict[str, list[str]] = defaultdict(list)
    for name, texts in metadata.captions.items():
        captions[spelt(name)] += texts
    return replace(
        metadata, captions=dict(captions), masks={spelt(name): spelt(mask) for name, mask in metadata.masks.items()}
    )


def _pictures(folder: Path, files: Sequence[Path], metadata: Metadata) -> tuple[list[Path], dict[Path, list[Path]]]:
    """The photos, in order, and the masks that are listed or lie beside them."""
    listed = {folder / name for name in metadata.captions}
    masks = {folder / name: [folder / mask] for name, mask in metadata.masks.items()}
    usual = {
        file
        for file in files
        if is_picture(file) and (file.parent == folder or (_repeat(file.parent) and file.parent.parent == folder))
    }
    candidates = (usual | listed) - {file for found in masks.values() for file in found}
    owners = _owners(candidates)
    for file in sorted(candidates - listed):
        ending = next((each for each in MASK_ENDINGS if file.stem.lower().endswith(each)), None)
        photo = ending and owners.find((file.parent / file.stem[: -len(ending)]).as_posix())
        if photo and photo != file:
            masks.setdefault(photo, []).append(file)
    beside = {file for found in masks.values() for file in found}
    return sorted(candidates - beside), masks


def _repeat(folder: Path) -> int:
    """How often kohya's scripts would use the photos in a folder; 0 if they would not."""
    found = _REPEATED.fullmatch(folder.name)
    return int(found[1]) if found else 0


def _repeats(folder: Path, photos: Sequence[Path]) -> list[str]:
    """Folders of kohya's scripts whose photos would be used more than once there."""
    places = sorted({photo.parent for photo in photos if photo.parent != folder})
    return [
        f"{place.name}/ is read as kohya's scripts do, but each photo counts once, not {_repeat(place)} times"
        for place in places
        if _repeat(place) > 1
    ]


def _twins(folder: Path, photos: Sequence[Path]) -> list[str]:
    """Two photos of one stem would share captions and masks."""
    stems = [_normalise_accents(photo.relative_to(folder).with_suffix("").as_posix()) for photo in photos]
    return [
        f"several photos are called {stem!r}, so their caption and mask are ambiguous"
        for stem in sorted({stem for stem in stems if stems.count(stem) > 1})
    ]
