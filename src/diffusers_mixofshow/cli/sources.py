"""What a command is given to read: one of our own packs, or another program's file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_mixofshow.errors import ConfigurationError, EDLoRANotFoundError


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.interop.foreign import Foreign

_SHOWN = 5
"""Names that an error lists of a folder in which nothing is spelt alike."""


def read_source(source: str) -> EDLoRA | Foreign:
    """Read an ED-LoRA from a file, a folder or the Hub, or what another program wrote.

    Raises:
        EDLoRANotFoundError: If there is nothing.
        EDLoRAFormatError: If it is an ED-LoRA with defects, or cannot be read at all.
        HubError: If the Hub refuses or cannot be reached.
    """
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.interop.foreign import read_foreign

    refuse_missing_file(source)
    path = Path(source)
    if path.exists() and not is_ours(path):
        return read_foreign(path)
    return EDLoRA.from_pretrained(source)


def read_pack(source: str) -> EDLoRA:
    """Read an ED-LoRA or a fused pack that is to be loaded into its base.

    Raises:
        ConfigurationError: If it is a complete pipeline, whose updates are in its weights.
        MixOfShowError: See `EDLoRA.from_pretrained`.
    """
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.edlora.merged import has_concepts

    refuse_missing_file(source)
    path = Path(source)
    if has_concepts(path.parent if path.is_file() else source):
        raise ConfigurationError(
            f"{source} is a complete pipeline with its concepts, no pack. Sample it with --base {source}; to measure "
            "it, give the pack that it was made of."
        )
    return EDLoRA.from_pretrained(source)


def refuse_missing_file(source: str) -> None:
    """Refuse ``folder/name`` where the folder is on this disk and has no such name, before the Hub is asked for it.

    Raises:
        EDLoRANotFoundError: Names what is in the folder.
    """
    path = Path(source)
    if path.exists() or path.parent == Path() or not path.parent.is_dir():
        return
    there = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, there) or there[:_SHOWN]
    raise EDLoRANotFoundError(
        f"{source} does not exist; the folder {path.parent} is there and holds {', '.join(near) or 'nothing'}. A "
        "repository of that name is read from the Hub where no such folder is."
    )


def is_ours(path: Path) -> bool:
    """Whether a file or folder is an ED-LoRA of this package, sound or not."""
    from diffusers_mixofshow.edlora.file import FILE_NAME
    from diffusers_mixofshow.edlora.reading import read_metadata

    if path.is_dir():
        return (path / FILE_NAME).exists()
    return path.name == FILE_NAME or "edlora" in read_metadata(path)
