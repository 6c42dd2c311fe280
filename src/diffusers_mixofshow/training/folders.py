"""Sort the files in a folder of photos into photos, captions, masks and metadata; the rest is named in remarks."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers_mixofshow.errors import ConfigurationError, TrainingDataError, list_first
from diffusers_mixofshow.pictures import PICTURE_SUFFIXES, is_picture
from diffusers_mixofshow.training.captions import METADATA_FILES, Metadata, read_metadata


MASK_FOLDERS = ("masks", "mask")
"""Names of the folder beside the photos that holds their masks, in any case of letters."""

MASK_ENDINGS = ("-masklabel", "_mask", "-mask", ".mask")
"""Endings of a mask's name behind its photo's name, for masks in the same folder."""

CAPTION_SUFFIXES = (".txt", ".caption")
"""Endings of the files beside a photo that hold its captions, one a line."""

_TRAIN = "train"
_REPEATED = re.compile(r"(\d+)_.+")
"""Folder of photos as kohya's scripts name it: how often each photo is used in an epoch, and what it shows."""
_SYSTEMS = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin")
_BESIDE_DOWNLOADS = ":zone.identifier"
"""Files that operating systems add to folders and downloads, which are ignored, as are names that start with a dot."""
_ABOUT_DATA = re.compile(r"(readme|license|licence|copying)(\..*)?", re.IGNORECASE)
"""Names of texts about the data set, which are ignored."""
_ELSEWHERE = "in a subfolder that is not read; name the photos in metadata, or move them up"
_NAMED = 3
"""How many files a sentence names before it says "and N more"."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of a folder of photos by their use.

    Args:
        folder: The folder that names are relative to.
        photos: All photos, in the order of their names.
        captions: Photo to its files of captions.
        descriptions: Photo to its JSON files.
        masks: Photo to its masks.
        strays: Text files that belong to no photo.
        metadata: Content of the metadata file, with photos and masks spelt as on the disk.
        defects: One sentence for each thing that cannot be used.
        remarks: Sentences about ignored files.
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
        """The path relative to the folder."""
        return path.relative_to(self.folder).as_posix()


def list_folder(folder: Path, *, column: str | None = None) -> Listing:
    """Find the use of every file in a folder of photos.

    Photos lie in the folder itself, in subfolders named as for kohya's scripts (``10_name``), or where the metadata
    file says. If the folder has no photos but a subfolder ``train``, that is taken instead. Names are matched in one
    Unicode form, and without regard to case if only one file fits.

    Args:
        folder: The folder.
        column: Column or key of captions in metadata; None ignores them.

    Raises:
        ConfigurationError: If there is no such folder.
        TrainingDataError: If it cannot be read.
    """
    folder, remarks = _find_photo_folder(folder)
    files, defects = _list_visible_files(folder)
    metadata = _match_names(read_metadata(folder, column=column), folder, files)
    photos, masks = _separate_masks(folder, files, metadata)
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
        defects=[*metadata.defects, *defects, *_list_ambiguous_stems(folder, photos), *sorted_out.defects],
        remarks=[*remarks, *_describe_repeats(folder, photos), *sorted_out.list_remarks()],
    )


def summarise_names(names: Sequence[str], one: str, several: str) -> list[str]:
    """Write one sentence about files that names the first of them; an empty list for no files.

    Args:
        names: The files.
        one: End of the sentence about one file.
        several: End of the sentence about several files.
    """
    if not names:
        return []
    return [f"{list_first(names, _NAMED)} {one if len(names) == 1 else several}"]


def join_remarks(about: str, remarks: Sequence[str]) -> str:
    """Join remarks to the text of one warning, each on its own line if there are several."""
    if len(remarks) == 1:
        return f"{about}: {remarks[0]}."
    return f"{about}:\n" + ";\n".join(f"  {remark}" for remark in remarks) + "."


class _Names:
    """Paths by name, in any Unicode form, and in any case if only one path fits."""

    def __init__(self, named: Iterable[tuple[str, Path]]) -> None:
        self._exact: dict[str, set[Path]] = defaultdict(set)
        self._folded: dict[str, set[Path]] = defaultdict(set)
        for name, path in named:
            self._exact[_normalise_accents(name)].add(path)
            self._folded[_normalise_accents(name).casefold()].add(path)

    def find(self, name: str) -> Path | None:
        """Find the path of a name; None if there is none or several fit equally well."""
        name = _normalise_accents(name)
        for found in (self._exact.get(name, set()), self._folded.get(name.casefold(), set())):
            if len(found) == 1:
                return next(iter(found))
        return None


class _Parts:
    """Sorts the files that are no photos by their use."""

    def __init__(self, folder: Path, photos: Sequence[Path], masks: Mapping[Path, Sequence[Path]]) -> None:
        self.folder, self._photos = folder, frozenset(photos)
        self.masks = {photo: list(files) for photo, files in masks.items()}
        self._taken = {file for files in masks.values() for file in files} | self._photos
        self._places = {photo.parent for photo in photos} | {folder}
        self._owners = _index_photos(photos)
        self.captions: dict[Path, list[Path]] = defaultdict(list)
        self.descriptions: dict[Path, list[Path]] = defaultdict(list)
        self.strays: list[Path] = []
        self.defects: list[str] = []
        self._useless: dict[str, list[Path]] = defaultdict(list)

    def add(self, file: Path) -> None:
        """Add one file to the captions, descriptions, masks, strays or unused files."""
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

    def list_remarks(self) -> list[str]:
        """Write a sentence about the unused files of each file ending, and of each subfolder."""
        told = []
        for _, files in sorted(self._useless.items()):
            names = [file.relative_to(self.folder).as_posix() for file in files]
            if all(file.parent in self._places or _is_mask_folder(file.parent) for file in files):
                told += summarise_names(
                    names, "is of no known use and was left alone", "are of no known use and were left alone"
                )
            else:
                told += summarise_names(names, f"is {_ELSEWHERE}", f"are {_ELSEWHERE}")
        return told

    def _owner(self, file: Path, place: Path) -> Path | None:
        """The photo that a file belongs to: ``1.txt`` or ``1.jpg.txt`` to ``1.jpg``."""
        return self._owners.find((place / file.stem).as_posix())


def _index_photos(photos: Iterable[Path]) -> _Names:
    return _Names((name.as_posix(), photo) for photo in photos for name in (photo, photo.with_suffix("")))


def _normalise_accents(name: str) -> str:
    """Normalise a name to NFC, as editors write it; file systems of Macs may separate letters and accents (NFD)."""
    return unicodedata.normalize("NFC", name)


def _find_photo_folder(folder: Path) -> tuple[Path, list[str]]:
    """Find the folder that holds the photos, itself or its ``train``; with a remark on what lies beside ``train``."""
    if not folder.is_dir():
        raise ConfigurationError(
            f"{folder} is no folder. Expected a folder of photos ({', '.join(PICTURE_SUFFIXES)}); a data set of "
            "the Hub is named by dataset_name."
        )
    try:
        entries = sorted(path for path in folder.iterdir() if not is_hidden(path.name))
    except OSError as error:
        raise TrainingDataError(f"{folder} cannot be read ({error}). Check who may read it.") from error
    train = next((path for path in entries if path.name.lower() == _TRAIN and path.is_dir()), None)
    if train is None or any(is_picture(path) or path.name.lower() in METADATA_FILES for path in entries):
        return folder, []
    beside = [path.name for path in entries if path != train and not _ABOUT_DATA.fullmatch(path.name)]
    return train, summarise_names(
        beside, "lies beside the photos' folder and was left alone", "were left alone beside it"
    )


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or the operating system's own."""
    return name.startswith(".") or name.lower() in _SYSTEMS or name.lower().endswith(_BESIDE_DOWNLOADS)


def _is_mask_folder(folder: Path) -> bool:
    return folder.name.lower() in MASK_FOLDERS


def _list_visible_files(folder: Path) -> tuple[list[Path], list[str]]:
    """List all visible files at any depth, including links to folders; with a defect for each unreadable folder."""
    files: list[Path] = []
    defects: list[str] = []

    def note_error(error: OSError) -> None:
        defects.append(f"{Path(error.filename).relative_to(folder).as_posix()} cannot be read ({error.strerror})")

    for place, folders, names in os.walk(folder, onerror=note_error):
        folders[:] = [name for name in folders if not is_hidden(name)]
        links = [name for name in folders if Path(place, name).is_symlink()]
        files += [Path(place, name) for name in (*names, *links) if not is_hidden(name)]
    return sorted(files), defects


def _match_names(metadata: Metadata, folder: Path, files: Sequence[Path]) -> Metadata:
    """Spell the names in metadata as the files on the disk; a name without a file stays as it is."""
    known = _Names((file.relative_to(folder).as_posix(), file) for file in files)

    def match(name: str) -> str:
        found = known.find(name) or known.find(name.replace("\\", "/"))
        return name if found is None else found.relative_to(folder).as_posix()

    captions: dict[str, list[str]] = defaultdict(list)
    for name, texts in metadata.captions.items():
        captions[match(name)] += texts
    return replace(
        metadata, captions=dict(captions), masks={match(name): match(mask) for name, mask in metadata.masks.items()}
    )


def _separate_masks(
    folder: Path, files: Sequence[Path], metadata: Metadata
) -> tuple[list[Path], dict[Path, list[Path]]]:
    """Tell photos, in the order of their names, from masks that metadata list or that lie beside their photo."""
    listed = {folder / name for name in metadata.captions}
    masks = {folder / name: [folder / mask] for name, mask in metadata.masks.items()}
    usual = {
        file
        for file in files
        if is_picture(file)
        and (file.parent == folder or (_count_repeats(file.parent) and file.parent.parent == folder))
    }
    candidates = (usual | listed) - {file for found in masks.values() for file in found}
    owners = _index_photos(candidates)
    for file in sorted(candidates - listed):
        ending = next((each for each in MASK_ENDINGS if file.stem.lower().endswith(each)), None)
        photo = ending and owners.find((file.parent / file.stem[: -len(ending)]).as_posix())
        if photo and photo != file:
            masks.setdefault(photo, []).append(file)
    beside = {file for found in masks.values() for file in found}
    return sorted(candidates - beside), masks


def _count_repeats(folder: Path) -> int:
    """How often kohya's scripts would use each photo of a folder in an epoch; 0 if its name is not of their form."""
    found = _REPEATED.fullmatch(folder.name)
    return int(found[1]) if found else 0


def _describe_repeats(folder: Path, photos: Sequence[Path]) -> list[str]:
    """Write a remark on each folder whose photos kohya's scripts would use more than once."""
    places = sorted({photo.parent for photo in photos if photo.parent != folder})
    return [
        f"{place.name}/ is read as kohya's scripts do, but each photo counts once, not {_count_repeats(place)} times"
        for place in places
        if _count_repeats(place) > 1
    ]


def _list_ambiguous_stems(folder: Path, photos: Sequence[Path]) -> list[str]:
    """List photos of one name but different endings, which would share captions and masks."""
    stems = [_normalise_accents(photo.relative_to(folder).with_suffix("").as_posix()) for photo in photos]
    return [
        f"several photos are called {stem!r}, so their caption and mask are ambiguous"
        for stem in sorted({stem for stem in stems if stems.count(stem) > 1})
    ]
