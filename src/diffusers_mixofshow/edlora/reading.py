"""Open untrusted files safely: everything that can be checked before allocating memory is checked first."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from diffusers_mixofshow.edlora.defects import sanitise
from diffusers_mixofshow.edlora.signatures import guess_kind
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError, suggest


LONGEST_HEADER = 8 * 2**20
"""In bytes; a LoRA with every layer of SDXL has some 300 thousand."""
LARGEST_FILE = 8 * 2**30
"""In bytes; an ED-LoRA of SD 1.5 has some 10 million, a LoRA of full rank some billion."""
MOST_TENSORS = 20_000
PREFIX = 8
"""A safetensors file starts with the length of its header, in this many bytes."""

_T = TypeVar("_T")

_MOST_READS = 1000
_BLOBS = "blobs"
_SNAPSHOTS = "snapshots"


def within(folder: Path, *names: str) -> Path:
    """Path of a file in a folder; refuses paths that leave the folder by a symbolic link or ``..``.

    In the Hub's cache, where a snapshot's files are links to blobs, links within the repository are allowed.

    Raises:
        EDLoRAFormatError: If the path leads out of the folder.
    """
    path = folder.joinpath(*names)
    home = folder.resolve()
    for parent in (home, *home.parents):
        if parent.name == _SNAPSHOTS and (parent.parent / _BLOBS).is_dir():
            home = parent.parent
    if not _leads_into(path, home):
        raise EDLoRAFormatError(
            f"{path} leads out of {folder} by a symbolic link or '..', which is not followed. Give the file itself if "
            "you trust it."
        )
    return path


def suggest_name(path: Path) -> str:
    """Suggest a similar name from the folder of a path that does not exist; empty if there is none."""
    try:
        return suggest(path.name, [sanitise(entry.name) for entry in path.parent.iterdir()])
    except (OSError, ValueError):
        return ""


def check_file(path: Path) -> int:
    """Check that a path is a regular file of plausible size; returns its size in bytes.

    Raises:
        EDLoRANotFoundError: If it does not exist.
        EDLoRAFormatError: If it is a folder, pipe or device, or too large.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise EDLoRANotFoundError(
            f"{sanitise(str(path))} does not exist. Give a folder with edlora.safetensors, a safetensors file, or a "
            f"Hub id such as 'user/edlora-potter'.{suggest_name(path)}"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise EDLoRAFormatError(f"{path} cannot be read: it is {kind}, not a file.")
    if status.st_size > LARGEST_FILE:
        raise EDLoRAFormatError(
            f"{path} cannot be read: it has {status.st_size:,} bytes, more than any LoRA ({LARGEST_FILE:,})."
        )
    return status.st_size


def identity(path: Path) -> tuple[int, int, int] | None:
    """Inode, modification time and size, which change if the file is replaced; None if it does not exist."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; its tensors are memory-mapped, so read from disk only when used.

    Raises:
        EDLoRANotFoundError: If it does not exist.
        EDLoRAFormatError: If it is not a safetensors file, or its header or number of tensors is too large.
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
        raise _unreadable(path, sanitise(str(error))) from error


def read_steadily(path: Path, take: Callable[[Any], _T]) -> _T:
    """Read from a safetensors file, again if it is replaced meanwhile, so that all values come from one file.

    safetensors opens the file a second time to map its tensors: without this check, metadata of the old file and
    tensors of the new one could be combined.

    Args:
        path: The file.
        take: Reads from the open file, possibly several times; must copy tensors if the file may be overwritten in
            place.

    Raises:
        EDLoRANotFoundError: If it does not exist.
        EDLoRAFormatError: If it is not a safetensors file, or is replaced again and again.
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
    raise EDLoRAFormatError(f"{path} is replaced again and again while it is read. Try again when its writer is done.")


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file, see `read_steadily`."""

    def take(opened: Any) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
        return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}

    return read_steadily(path, take)


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata in the header of a safetensors file; empty for any other file."""
    try:
        with open_tensors(path) as opened:
            return dict(opened.metadata() or {})
    except (EDLoRAFormatError, EDLoRANotFoundError):
        return {}


def _leads_into(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # a link that leads to itself
        return False


def _header_defect(path: Path, size: int) -> str:
    """Defect of the first bytes of a safetensors file; empty if there is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(PREFIX), "little")
    if size < PREFIX:
        return f"it has {size} bytes"
    if length > min(LONGEST_HEADER, size - PREFIX) and (kind := guess_kind(path)):
        return f"it is {kind}"
    if length > LONGEST_HEADER:
        return f"it is no safetensors file (its header would have {length:,} bytes, more than {LONGEST_HEADER:,})"
    if PREFIX + length > size:
        return f"its header would have {length:,} bytes, the whole file has {size:,}"
    return ""


def _unreadable(path: Path, defect: str) -> EDLoRAFormatError:
    return EDLoRAFormatError(
        f"{path} cannot be read as safetensors: {defect}. Expected an ED-LoRA, LoRA or textual inversion: a "
        "folder, or a file .safetensors, .pth, .pt or .bin. If this is to be one, copy or download it again."
    )
