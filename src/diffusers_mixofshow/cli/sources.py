"""Read what a command line names: an ED-LoRA, a fused pack, or another program's file."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_mixofshow.errors import EDLoRANotFoundError, warn


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.interop.foreign import Foreign

_SHOWN = 5
"""How many names of a folder an error lists if none is similar to the missing one."""


def read_source(source: str) -> EDLoRA | Foreign:
    """Read an ED-LoRA, or another program's file, from a file, a folder or the Hub.

    Raises:
        EDLoRANotFoundError: If there is no such file, folder or repository.
        EDLoRAFormatError: If it is an ED-LoRA with defects, or cannot be read at all.
        HubError: If the Hub refuses or cannot be reached.
    """
    from diffusers_mixofshow.interop.opening import read_any

    refuse_missing_file(source)
    return read_any(source)


def read_pack(source: str, base: str | None) -> EDLoRA:
    """Read an ED-LoRA, a fused pack or another program's file that is to be loaded into its base.

    Args:
        source: File, folder or Hub id.
        base: The base that the user named; without it, one is guessed for a file that does not name its own.

    Raises:
        MixOfShowError: See `open_edlora`.

    Warns:
        MixOfShowWarning: Which base was guessed.
    """
    from diffusers_mixofshow.interop.foreign import default_base
    from diffusers_mixofshow.interop.opening import open_edlora

    refuse_missing_file(source)
    opened = open_edlora(source)
    guess = default_base(opened.foreign) if opened.foreign is not None and not base else ""
    if not guess or opened.edlora.base_model:
        return opened.edlora
    warn(f"{source} does not tell its base model; {guess} is taken; --base names another.")
    return replace(opened.edlora, base_model=guess)


def refuse_missing_file(source: str) -> None:
    """Refuse ``folder/name`` if the folder is on this disk without such a name, instead of looking for it on the Hub.

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
