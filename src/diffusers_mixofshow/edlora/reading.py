"""Opening untrusted files: everything that can be checked before memory is allocated is checked first."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from diffusers_mixofshow.edlora.defects import shown
from diffusers_mixofshow.edlora.signatures import guess_kind
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError, meant


LONGEST_HEADER = 8 * 2**20
"""Bytes; that of a LoRA with every layer of SDXL has some 300 thousand."""
LARGEST_FILE = 8 * 2**30
"""Bytes; an ED-LoRA of SD 1.5 has some 10 million, a merged one of full rank some billion."""
MOST_TENSORS = 20_000

_T = TypeVar("_T")

_PREFIX = 8
_MOST_READS = 1000
_BLOBS = "blobs"
_SNAPSHOTS = "snapshots"


def within(folder: Path, *names: str) -> Path:
    """Path of a file in a folder, which no symbolic link leads out of.

    In the Hub's cache, where a snapshot's files are links to blobs, the repository counts as the folder.

    Raises:
        EDLoRAFormatError: If the file, or a folder on the way, is a link to somewhere else.
    """
    path = folder.joinpath(*names)
    home = folder.resolve()
    for parent in (home, *home.parents):
        if parent.name == _SNAPSHOTS and (parent.parent / _BLOBS).is_dir():
            home = parent.parent
    if not _leads_into(path, home):
        raise EDLoRAFormatError(
            f"{path} leads out of {folder} by a symbolic link or '..', which is not followed. Give the file itself if "
            "you trust where it leads."
        )
    return path


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; False also for paths that the system refuses, such as names of 10,000 characters."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def suggest_name(path: Path) -> str:
    """The question whether a name was meant that lies where a path that does not exist would lie; empty if none is."""
    try:
        return meant(path.name, [shown(entry.name) for entry in path.parent.iterdir()])
    except (OSError, ValueError):
        return ""


def check_file(path: Path) -> int:
    """Bytes of a file, once it is known to be one: no folder, pipe or device, and of a size that can be meant.

    Raises:
        EDLoRANotFoundError: If there is nothing.
        EDLoRAFormatError: If it is something else, or too large.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise EDLoRANotFoundError(
            f"{shown(str(path))} does not exist. Give a folder with edlora.safetensors, a safetensors file, or a Hub "
            f"id such as 'user/edlora-potter'.{suggest_name(path)}"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise EDLoRAFormatError(f"{path} cannot be read: it is {kind}, no file.")
    if status.st_size > LARGEST_FILE:
        raise EDLoRAFormatError(
            f"{path} cannot be read: it has {status.st_size:,} bytes, more than any LoRA ({LARGEST_FILE:,})."
        )
    return status.st_size


def identity(path: Path) -> tuple[int, int, int] | None:
    """Inode, time and size, which change when another file takes the place of this one; None where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, open: its tensors are mapped into memory, not copied, and read where they are looked at.

    Raises:
        EDLoRANotFoundError: If there is nothing.
        EDLoRAFormatError: If it is no safetensors file, or its header or number of tensors is beyond all measure.
    """
    size = check_file(path)
    try:
        if defect := _header_defect(path, size):
            raise _unreadable(path, defect)
        with safe_open(path, framework="pt") as opened:
            if (count := len(opened.keys())) > MOST_TENSORS:
                raise _unreadable(path, f"it has {count:,} tensors, more than {MOST_TENSORS:,}")
            yield opened
    except EDLoRAFormatError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, shown(str(error))) from error


def read_steadily(path: Path, take: Callable[[Any], _T]) -> _T:
    """What is taken from one and the same safetensors file, also while others take its place.

    safetensors opens the file a second time to map its tensors, so that a file which is replaced in between would
    give its metadata, and its successor the tensors.

    Args:
        path: The file.
        take: Takes something from the open file, more than once if it was replaced meanwhile; tensors as copies,
            where the file may be written in its place.

    Raises:
        EDLoRANotFoundError: If there is nothing.
        EDLoRAFormatError: If it is no safetensors file, or replaced over and over.
    """
    for _ in range(_MOST_READS):
        before = identity(path)
        try:
            with open_tensors(path) as opened:
                content = take(opened)
        except (EDLoRAFormatError, EDLoRANotFoundError):
            if identity(path) == before:
                raise
            continue
        if identity(path) == before:
            return content
    raise EDLoRAFormatError(f"{path} is written over and over while it is read. Read it when its writer is done.")


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of one and the same safetensors file, see `read_steadily`."""

    def take(opened: Any) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
        return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}

    return read_steadily(path, take)


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata in the header of a safetensors file; empty of any other file."""
    try:
        with open_tensors(path) as opened:
            return dict(opened.metadata() or {})
    except (EDLoRAFormatError, EDLoRANotFoundError):
        return {}


def _leads_into(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # a link to itself
        return False


def _header_defect(path: Path, size: int) -> str:
    """What is wrong with the first bytes of a safetensors file; empty if nothing."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_PREFIX), "little")
    if size < _PREFIX:
        return f"it has {size} bytes"
    if length > min(LONGEST_HEADER, size - _PREFIX) and (kind := guess_kind(path)):
        return f"it is {kind}"
    if length > LONGEST_HEADER:
        return f"its header would have {length:,} bytes, more than {LONGEST_HEADER:,}"
    if _PREFIX + length > size:
        return f"its header would have {length:,} bytes, the whole file has {size:,}"
    return ""


def _unreadable(path: Path, defect: str) -> EDLoRAFormatError:
    return EDLoRAFormatError(
        f"{path} cannot be read as safetensors: {defect}. Expected an ED-LoRA, LoRA or textual inversion: a "
        "folder, or a file .safetensors, .pth, .pt or .bin. If this is to be one, copy or download it again."
    )
