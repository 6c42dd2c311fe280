"""Files that appear whole or not at all."""

from __future__ import annotations

import io
import os
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_mixofshow.errors import FileWriteError


if TYPE_CHECKING:
    from PIL import Image


_LONGEST_WRITE_S = 3600.0
"""A temporary file older than this is of a process that was killed."""


def write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, flush to the disk, and rename; makes the folder where it is missing.

    Whoever reads meanwhile, or after a power cut, finds the old file or the new one. Of several processes that write
    at once, the last one's file stays. A symbolic link at `path` is replaced, not followed.

    Raises:
        FileWriteError: If there is no room or no permission, or a folder is in the way; `path` is what it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
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


def refuse_unwritable(*paths: Path) -> None:
    """Notice what cannot be written before it is made, not after it; nothing is left behind.

    Args:
        paths: Files that are to be written; their folders may be missing.

    Raises:
        FileWriteError: If the folder, or the nearest one above it that exists, takes no file.
    """
    for path in paths:
        try:
            write_probe(path.absolute().parent)
        except OSError as error:
            raise FileWriteError(
                f"{path} cannot be written: {error.strerror or error}. Choose a folder that you may write to."
            ) from error


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
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    write_whole(path, buffer.getvalue())


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
    for left in path.parent.glob(f".{_escaped(path.name)}.*.tmp"):
        with suppress(OSError):  # another process was faster, or the folder is not ours
            if time.time() - left.stat().st_mtime > _LONGEST_WRITE_S:
                left.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
