"""Files that appear whole or not at all, replace others only where that was asked for, and have portable names."""

from __future__ import annotations

import glob
import io
import os
import re
import tempfile
import time
import unicodedata
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_mixofshow.errors import ConfigurationError, FileWriteError, OverwriteError, list_first


if TYPE_CHECKING:
    from PIL import Image


_LONGEST_WRITE_S = 3600.0
"""A temporary file older than this was left by a process that was killed."""
_NAMED = 4
"""How many paths an error lists before it says "and N more"."""
_REFUSED = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
_RESERVED = re.compile(r"((?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9\xb9\xb2\xb3]) *)(\..*)?", re.IGNORECASE)
"""Names of Windows' devices, which no file or folder can have there, with any ending."""


def portable_name(name: str) -> str:
    """Spell a name so that every system takes it for a file or folder; most names stay as they are.

    What Windows refuses becomes ``_``: some characters, and dots and spaces at the end. A name that it reserves for a
    device gets a ``_`` before its ending: ``con`` becomes ``con_``, and ``con.png`` ``con_.png``.
    """
    spelt = re.sub(r"[. ]+$", lambda end: "_" * len(end[0]), _REFUSED.sub("_", name))
    reserved = _RESERVED.fullmatch(spelt)
    return f"{reserved[1]}_{reserved[2] or ''}" if reserved else spelt


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; then flush that file to the disk and rename it to `path`.

    A missing folder is made. A reader finds the old file or the new one, never a part, even after a power cut. If
    several processes write at once, the last rename wins. A symbolic link at `path` is replaced, not followed.

    Args:
        path: The file.
        flush: Whether to flush, which is slow for large files; after a power cut one without may hold anything.

    Raises:
        FileWriteError: If there is no room or no permission, or a folder has that name; `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            if temporary.stat().st_mode != mode:  # safetensors makes files that only their owner may read
                with suppress(OSError):  # some network folders do not let modes be set
                    temporary.chmod(mode)
            if flush:
                with temporary.open("rb+") as written:
                    os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FileWriteError(
            f"{path} cannot be written: {error.strerror or error}. What stood there before is untouched. Make room, "
            "or choose a folder that you may write to."
        ) from error
    if flush:
        _flush_folder(path.parent)
    _delete_leftovers(path)


def check_outputs(*files: Path, overwrite: bool) -> None:
    """Check before a long computation that its output files can be written; nothing is created.

    Args:
        files: Every file that will be written; their folders may be missing.
        overwrite: Whether existing files may be replaced.

    Raises:
        ConfigurationError: If two of them are one file, or one would be the folder of another.
        OverwriteError: If one exists and `overwrite` is False.
        FileWriteError: If one is a folder, or no file can be written to its folder.
    """
    _refuse_collisions(files)
    if folders := [file for file in files if _resolve_parent(file).is_dir()]:
        raise FileWriteError(
            f"Expected files to write, but there are folders: {list_first(folders, _NAMED)}. Choose other names."
        )
    refuse_overwriting(*files, overwrite=overwrite)
    for file in files:
        try:
            write_probe(file.absolute().parent)
        except OSError as error:
            raise FileWriteError(
                f"{file} cannot be written: {error.strerror or error}. Choose a folder that you may write to."
            ) from error


def find_existing(*places: Path) -> list[Path]:
    """List the paths at which a file, a folder or a link exists; a broken link counts as existing."""
    return [place for place in places if os.path.lexists(_resolve_parent(place))]


def _resolve_parent(place: Path) -> Path:
    """Resolve links and ``..`` in the parent as if missing folders had been made: ``missing/../file`` is ``file``."""
    return Path(os.path.realpath(place.parent), place.name)


def refuse_overwriting(*places: Path, overwrite: bool, otherwise: str = "Choose another place") -> None:
    """Refuse to replace existing files and folders; cheap enough to ask again when the work is done.

    Args:
        places: Files and folders that will be written.
        overwrite: Whether existing ones may be replaced.
        otherwise: The error's advice beside overwrite=True.

    Raises:
        OverwriteError: Names the paths that exist.
    """
    if not overwrite and (there := find_existing(*places)):
        verb = "is" if len(there) == 1 else "are"
        raise OverwriteError(
            f"{list_first(there, _NAMED)} {verb} there already, and nothing is overwritten unasked. {otherwise}, or "
            f"give overwrite=True, which replaces {'it' if len(there) == 1 else 'them'}."
        )


def _refuse_collisions(files: Sequence[Path]) -> None:
    """Refuse two names that some file system takes for one, and a file that another one needs as its folder."""
    spelt = [_fold_path(file) for file in files]
    for index, one in enumerate(spelt):
        for other, file in zip(spelt[:index], files, strict=False):
            if one == other or one in other.parents or other in one.parents:
                raise ConfigurationError(
                    f"{file} and {files[index]} are to be written, but one is where the other would be. Give each a "
                    "place of its own."
                )


def _fold_path(path: Path) -> Path:
    """Fold case and Unicode form: paths equal after this are one file on systems that ignore either."""
    return Path(unicodedata.normalize("NFC", str(path.resolve())).casefold())


def write_probe(folder: Path) -> None:
    """Try to write a temporary file to a folder, or to the nearest folder above it that exists.

    Raises:
        OSError: If it cannot be written.
    """
    present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with tempfile.TemporaryFile(dir=present):
        pass


def write_picture(path: Path, picture: Image.Image, kind: str = "PNG", **options: Any) -> None:
    """Write a picture; the file appears whole or not at all.

    Args:
        path: The file.
        picture: What it shows.
        kind: Pillow's name of the format.
        options: Passed to Pillow.

    Raises:
        FileWriteError: See `write_whole`.
    """
    write_whole(path, encode_picture(picture, kind, **options))


def encode_picture(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode a picture as the bytes of a file.

    Args:
        picture: What it shows.
        kind: Pillow's name of the format.
        options: Passed to Pillow.
    """
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _flush_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut, on systems that can flush a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _delete_leftovers(path: Path) -> None:
    """Delete old temporary files of the same path, which killed processes have left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):  # another process was faster, or the folder is not ours
            if time.time() - left.stat().st_mtime > _LONGEST_WRITE_S:
                left.unlink()
