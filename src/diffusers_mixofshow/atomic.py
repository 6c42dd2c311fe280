"""Files that appear whole or not at all, and replace others only where that was asked for."""

from __future__ import annotations

import glob
import io
import os
import tempfile
import time
import unicodedata
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_mixofshow.errors import ConfigurationError, FileWriteError, OverwriteError


if TYPE_CHECKING:
    from PIL import Image


_LONGEST_WRITE_S = 3600.0
"""A temporary file older than this is of a process that was killed."""
_NAMED = 4
"""Places that an error names."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Let a caller write to a temporary name beside `path`; flush that to the disk, and rename it.

    Makes the folder where it is missing. Whoever reads meanwhile, or after a power cut, finds the old file or the new
    one. Of several processes that write at once, the last one's file stays. A symbolic link at `path` is replaced, not
    followed.

    Raises:
        FileWriteError: If there is no room or no permission, or a folder is in the way; `path` is what it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch(exist_ok=False)
            yield temporary
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
    _flush_names(path.parent)
    _sweep(path)


def check_outputs(*files: Path, overwrite: bool) -> None:
    """Notice before the work what would fail, or destroy something, after it; nothing is left behind.

    Args:
        files: Everything that is to be written; their folders may be missing.
        overwrite: Whether what stands there may go.

    Raises:
        ConfigurationError: If two of them are one file, or one would be the folder of another.
        OverwriteError: If one is there already, and may not go.
        FileWriteError: If a folder stands in the place of one, or its own folder takes no file.
    """
    _refuse_collisions(files)
    if folders := [file for file in files if _when_made(file).is_dir()]:
        raise FileWriteError(
            f"Expected files to write, but there are folders: {_list_first(folders)}. Choose other names."
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
    """List the paths at which a file, a folder or a link exists; a broken link counts."""
    return [place for place in places if os.path.lexists(_when_made(place))]


def _when_made(place: Path) -> Path:
    """The place as writing will find it, which makes folders that are missing: a ``..`` leads out of these again."""
    return Path(os.path.realpath(place.parent), place.name)


def refuse_overwriting(*places: Path, overwrite: bool, otherwise: str = "Choose another place") -> None:
    """Refuse to write where something is; cheap enough for a second look when the work is done.

    Args:
        places: Files and folders that would be replaced.
        overwrite: Whether they may be.
        otherwise: What else can be done.

    Raises:
        OverwriteError: Names all that is there.
    """
    if not overwrite and (there := find_existing(*places)):
        verb = "is" if len(there) == 1 else "are"
        raise OverwriteError(
            f"{_list_first(there)} {verb} there already, and nothing is overwritten unasked. {otherwise}, or give "
            f"overwrite=True, which replaces {'it' if len(there) == 1 else 'them'}."
        )


def _refuse_collisions(files: Sequence[Path]) -> None:
    """Refuse names that are one file on some system, and a file that would have to be a folder as well."""
    spelt = [_fold_path(file) for file in files]
    for index, one in enumerate(spelt):
        for other, file in zip(spelt[:index], files, strict=False):
            if one == other or one in other.parents or other in one.parents:
                raise ConfigurationError(
                    f"{file} and {files[index]} are to be written, but one is where the other would be. Give each a "
                    "place of its own."
                )


def _fold_path(path: Path) -> Path:
    """A path as systems see it to which capitals and the forms of Unicode's letters are all one."""
    return Path(unicodedata.normalize("NFC", str(path.resolve())).casefold())


def _list_first(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(map(str, paths[:_NAMED])) + more


def write_probe(folder: Path) -> None:
    """Write a file without a name into a folder, or into the nearest one above it that exists.

    Raises:
        OSError: If that takes no file.
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
    """The content of a picture's file.

    Args:
        picture: What it shows.
        kind: Pillow's name of the format.
        options: Passed to Pillow.
    """
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _flush_names(folder: Path) -> None:
    """Make a rename outlast a power cut, on systems and disks that let a folder be flushed."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sweep(path: Path) -> None:
    """Delete what killed processes left of writing the same file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):  # another process was faster, or the folder is not ours
            if time.time() - left.stat().st_mtime > _LONGEST_WRITE_S:
                left.unlink(missing_ok=True)
